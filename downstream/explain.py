"""`./launch.sh explain OUT NOTE.txt`: where a fine-tuned classifier looks in a note, as an HTML page.

For a physician, who sees whether it looks at the mention of what was asked. It needs "attention" in head.pooling;
shown is the mean of the attention over folds, seeds and directions. The page holds the note: treat it as you treat
the note.
"""

from __future__ import annotations

import collections

import torch
from pydantic import Field

from cluster import config, logs, storage
from cluster.config import Place, Section
from cluster.errors import ConfigError, DataError
from downstream.classifier import padded
from downstream.explain_page import Explanation, page
from downstream.parts import encode_for
from downstream.predict import Predictor
from downstream.reading import places_of_tokens
from downstream.tasks.examples import Example
from downstream.tasks.status import StatusTask


class ExplainRecipe(Section):
    """`./launch.sh explain OUT NOTE.txt [out=FILE]`."""

    classifier: Place = Field(description="what finetune left: RUN/finetune/TASK")
    note: Place = Field(description="a file with the text of one note")
    out: Place | None = Field(None, description="the page; if not given, beside the classifier")


def main(args: list[str]) -> None:
    """The verb."""
    places = [word for word in args if "=" not in word]
    if len(places) != 2:
        raise ConfigError("explain what? give the folder of a classifier and a text file with a note")
    named = [f"classifier={places[0]}", f"note={places[1]}", *(word for word in args if "=" in word)]
    asked = config.load(ExplainRecipe, named, None)
    try:
        text = storage.read_bytes(asked.note).decode()
    except UnicodeDecodeError:
        raise DataError(f"{asked.note}: is not UTF-8 text; convert it (iconv)") from None
    predictor = Predictor(asked.classifier)
    name = asked.note.rstrip("/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
    example = predictor.example(name, text)
    if example is None:
        looked_for = "no mention of what is asked" if isinstance(predictor.recipe.task, StatusTask) else "no word"
        raise DataError(f"{asked.note}: has {looked_for}, so there is nothing to explain")
    found = explanation(predictor, example)
    out = asked.out or storage.join(asked.classifier, f"explanation-{name}.html")
    storage.write_bytes(out, page(found))
    on = sum(w for a, b, w in found.attention if any(a < end and b > start for start, end in found.mentions))
    said = f"{on:.0%} of the attention lies on {len(found.mentions)} mentions; " if found.mentions else ""
    best = max(range(len(found.classes)), key=lambda k: found.probabilities[k])
    logs.say(f"{found.classes[best]} ({found.probabilities[best]:.1%}); {said}look at {out}")


def explanation(predictor: Predictor, example: Example) -> Explanation:
    """Probabilities and attention of a note. Raises ConfigError where the classifier has no attention."""
    if "attention" not in predictor.recipe.head.pooling:
        raise ConfigError('this classifier has no attention; fine-tune with "attention" in head.pooling')
    weights: dict[tuple[int, int], float] = collections.defaultdict(float)
    for part in predictor.parts:
        classifier, trained = predictor.classifier(part).eval(), predictor.model_of(part)
        [note] = encode_for(trained, [example], predictor.recipe.max_tokens, predictor.tell)
        device = next(classifier.parameters()).device
        weight_T = classifier.attention(padded([note], device))[0].cpu()
        forwards = note.reversed() if part.backward else note
        places = places_of_tokens(trained.tokenizer, example, forwards, predictor.tell)
        if part.backward:
            weight_T = torch.flip(weight_T, [0])
        for place, weight in zip(places, weight_T.tolist(), strict=True):
            weights[place] += weight / len(predictor.parts)
    weights.pop((-1, -1), None)  # the question and the marks are not of the note
    total = sum(weights.values()) or 1.0
    task = predictor.recipe.task
    named = [task.concept, *task.synonyms] if isinstance(task, StatusTask) else []
    return Explanation(
        note_id=example.example_id,
        concept=tuple(name for name in named if name),
        classes=predictor.classes,
        probabilities=tuple(float(p) for p in predictor([example])[0]),
        text=example.text,
        attention=tuple((start, end, weight / total) for (start, end), weight in sorted(weights.items()) if weight > 0),
        mentions=example.mentions,
    )
