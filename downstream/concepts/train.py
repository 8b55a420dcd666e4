"""`./launch.sh finetune recipes/concepts/train.toml corpus=GOLD.jsonl`: annotated notes become a reader and its score.

    annotated notes ─┬─► folds by patient ─► reader │ without the language model │ rules │ TF-IDF ─► tables, results
                     └─► all of them ─► OUT/reader.npz, for ./launch.sh annotate OUT notes.csv

Every mention is tested once, by a reader that has seen no note of its patient and none that is nearly the same. OUT
holds recipe.toml, run.json (what the folder belongs to), reader.npz, and results.json, written last.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from cluster import config, logs, storage, tracking
from cluster.config import Place, Section
from cluster.errors import ConfigError, DataError
from cluster.tracking import TrackingConfig
from downstream.concepts import clauses, formats, sections
from downstream.concepts.attributes import Attributes
from downstream.concepts.evaluate import asked_about, folded, tested
from downstream.concepts.features import Examples
from downstream.concepts.formats import Format
from downstream.concepts.learning import TuneConfig
from downstream.concepts.passages import TunedPassages
from downstream.concepts.reader import FILE, Reader
from downstream.concepts.schema import Note
from downstream.concepts.states import States
from downstream.concepts.tagger import SectionTagger
from downstream.concepts.tuned import PARTS, Tuner
from downstream.leakage import alike
from downstream.metrics import Floats
from downstream.tasks.table import rows
from downstream.work import RESULTS, enter, lineage, open_models
from pretrain.run import Trained, hashed

OTHER = "other"
LEAST = 10  # passages of a kind of section
PASSAGES = 200  # under headings, from which a tagger of sections is learned
OTHERS = 0.1  # what a passage of other notes counts where there are enough of the annotated ones


class ConceptsTask(Section):
    """`[task] name = "concepts"`."""

    name: Literal["concepts"] = "concepts"


class ConceptsRecipe(Section):
    """From annotated notes to a reader."""

    task: ConceptsTask = ConceptsTask()
    corpus: Place = Field(description="annotated notes; * stands for several files")
    format: Format = Field("jsonl", description="of the annotated notes")
    beside: Place | None = Field(
        None, description="annotated notes of other kinds, learned from as far as it helps, never tested; as `corpus`"
    )
    skip_bad: bool = Field(False, description="annotated notes that are wrong are left out and counted")
    run: Place | None = Field(None, description="run directory of a pretrained language model")
    backward: Place | None = Field(None, description="run of one that reads backwards; both are read")
    sections: Place | None = Field(
        None,
        description="notes with headings: CSV, JSON lines or Parquet; it learns sections, tuned models what these say",
    )
    text: str = Field("text", description="column of the note there")
    out: Place | None = Field(None, description="where the reader goes; RUN/finetune/concepts if not given")
    tune: TuneConfig = TuneConfig()
    folds: int = Field(5, ge=2, description="every patient is tested once, in so many folds")
    seed: int = Field(1, description="of the cut")
    others: bool = Field(False, description="patients with ids as in the model's corpus are other people")
    tracking: TrackingConfig = TrackingConfig()


def main(args: list[str]) -> None:
    """The verb, for recipes with this task."""
    recipe = config.load(ConceptsRecipe, args)
    if recipe.backward and not recipe.run:
        raise ConfigError("backward: needs run, the model that reads forwards")
    if recipe.tune.epochs and not recipe.run:
        raise ConfigError("tune.epochs: needs run, the model that is tuned")
    if not recipe.out and not recipe.run:
        raise ConfigError("out: is needed; say where the reader goes")
    models = open_models(recipe.run, recipe.backward) if recipe.run else []
    out = recipe.out or storage.join(recipe.run or "", "finetune", recipe.task.name)
    notes = _notes(recipe, recipe.corpus)
    if not any(len(values) > 1 for values in _values(notes).values()):
        raise DataError(f"{recipe.corpus}: no attribute has two values, so there is nothing to learn")
    others = _notes(recipe, recipe.beside) if recipe.beside else []
    _check_unseen(notes, [] if recipe.others else models)
    if recipe.beside:
        _check_apart(recipe.beside, notes, others)
    about = {"notes": config.fingerprint([note.record() for note in notes])}
    if others:
        about["beside"] = config.fingerprint([note.record() for note in others])
    if not enter(out, recipe, models, about):
        logs.say(f"{out}: finished before with this recipe and these notes; nothing left to do")
        return
    states = States(models) if models else None
    headed = [cells[0] for cells in rows(recipe.sections, [recipe.text])] if recipe.sections else []
    with logs.progress("reading annotated notes", len(notes) + len(others)) as advance:
        examples = Examples.of(notes, states, advance)
        beside = Examples.of(others, states, lambda done, rate: advance(len(notes) + done, rate)) if others else None
    _show_counts(examples)
    by_document = _groups(notes)
    groups, tuned = np.array([by_document[document] for document in examples.documents]), None
    names = asked_about(examples, groups, recipe.folds)
    if recipe.tune.epochs and states:
        said = clauses.annotated(headed, [note.text for note in notes])
        tuner = Tuner(states.models, notes, recipe.tune, [*others, *said])
        if tuner.others:
            count = sum(len(note.spans) for note in tuner.others)
            logs.say(f"the models learn first from {count:,} mentions and clauses of other notes")
        # One for every part of the documents and for all of them, in every fold and at the end.
        passes, passed = recipe.tune.epochs * (PARTS + 1) * (recipe.folds + 1), itertools.count(1)
        with logs.progress("tuning the models", passes + bool(tuner.others)) as advance:
            tuner.passed = lambda: advance(next(passed), "")
            cut = folded(examples, groups, recipe.folds, recipe.seed, tuner, beside)
            tuned, examples = tuner.fit(examples.documents), tuner.crossed(examples)
    else:
        cut = folded(examples, groups, recipe.folds, recipe.seed, None, beside)
    learned = itertools.count(1)
    with logs.progress("learning what is said", len(names) * (recipe.folds + 1)) as advance:
        results = tested(names, examples, cut, lambda name: advance(next(learned), name))
        attributes = Attributes.fit(examples, beside, lambda name: advance(next(learned), name))
    if tuned and not attributes.hear_tuned():
        logs.say("the tuned models add nothing to the words and states; they are not kept")
        tuned = None
    Reader(attributes, states, _tagger(recipe, notes, headed, states), tuned).save(storage.join(out, FILE))
    facts = {"task": "concepts", "lineage": {("backward" if m.backward else "model"): lineage(m) for m in models}}
    counts = {"notes": len(notes), "mentions": len(examples.spans)}
    storage.write_json(storage.join(out, RESULTS), {**facts, **about, **counts, "values": results})
    f1s = {f"{value}/{name}_f1": one["f1"] for value, said in results.items() for name, one in said.items()}
    tracking.summarize(out, recipe.tracking, facts, f1s)
    logs.say(f"reader and results in {out}")


def _notes(recipe: ConceptsRecipe, place: str) -> list[Note]:
    urls = storage.expand(place) if "*" in place else [place]  # BRAT's is a folder
    return [note for url in urls for note in formats.read(url, recipe.format, recipe.skip_bad)]


def _values(notes: Sequence[Note]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for note in notes:
        for span in note.spans:
            for name, value in span.attributes.items():
                found.setdefault(name, set()).add(value)
    return found


def _check_unseen(notes: Sequence[Note], models: Sequence[Trained]) -> None:
    """Raises DataError where a language model has read a patient that its reader will be scored on."""
    for trained in models:
        read = frozenset[str]().union(*trained.patients.values())
        if known := sorted({note.patient_id for note in notes if note.patient_id and hashed(note.patient_id) in read}):
            raise DataError(
                f"{trained.run}: has read {len(known):,} of the patients of the annotated notes, such as {known[0]}; "
                "pretrain without them, or set others=true where the same ids are other people"
            )


def _check_apart(beside: str, notes: Sequence[Note], others: Sequence[Note]) -> None:
    """Raises DataError where what is learned from besides would tell of what is tested, or tells nothing."""
    names = _values(notes).keys()
    if not names & _values(others).keys():
        raise DataError(f"{beside}: no mention has an attribute of the annotated notes ({', '.join(sorted(names))})")
    patients = {note.patient_id for note in notes if note.patient_id}
    if known := [note for note in others if note.patient_id in patients]:
        raise DataError(
            f"{beside}: {len(known):,} notes are of patients of the annotated notes, such as {known[0].patient_id}; "
            "take them out, or add them to corpus"
        )
    texts = [note.text for note in (*notes, *others)]
    if same := sorted({a for a, b in alike(texts) if a >= len(notes) > b}):
        raise DataError(
            f"{beside}: {len(same):,} notes are nearly the same as an annotated one, such as "
            f"{others[same[0] - len(notes)].doc_id}; take them out, or add them to corpus"
        )


def _groups(notes: Sequence[Note]) -> dict[str, str]:
    """For every document (patient) the name of those that belong together: a note of one is nearly one of the other."""
    names = [note.patient_id or note.doc_id for note in notes]
    place = {name: number for number, name in enumerate(dict.fromkeys(names))}
    links = sparse.lil_matrix((len(place), len(place)), dtype=bool)
    for a, b in alike([note.text for note in notes]):
        links[place[names[a]], place[names[b]]] = True
    _, which = connected_components(links.tocsr(), directed=False)
    return {name: str(which[number]) for name, number in place.items()}


def _show_counts(examples: Examples) -> None:
    counts: dict[tuple[str, str], int] = {}
    for span in examples.spans:
        for one in span.attributes.items():
            counts[one] = counts.get(one, 0) + 1
    lines = [[name, value, f"{count:,}"] for (name, value), count in sorted(counts.items())]
    logs.table(f"{len(examples.spans):,} mentions", ["attribute", "value", "mentions"], lines)


def _tagger(
    recipe: ConceptsRecipe, notes: Sequence[Note], headed: Sequence[str], states: States | None
) -> SectionTagger | None:
    """Learned from what stands under the headings of all notes at hand; None where that is little."""
    texts = dict.fromkeys(note.text for note in notes)
    own = len(texts)
    texts |= dict.fromkeys(headed)
    passages, labels, groups = [], [], []
    for number, text in enumerate(texts):
        for section in sections.find(text):
            body = text[section.heading[1] if section.heading else section.start : section.end].strip()
            if section.heading and section.label != OTHER and body:
                passages.append(body)
                labels.append(section.label)
                groups.append(number)
    counts = Counter(labels)
    kept = [i for i, label in enumerate(labels) if counts[label] >= LEAST]
    if len(kept) < PASSAGES or len({labels[i] for i in kept}) < 2:
        logs.say(f"{len(kept):,} passages under headings: too few to learn what sections without heading look like")
        return None
    logs.say(f"learning sections from {len(kept):,} passages under headings")
    enough = sum(groups[i] < own for i in kept) >= PASSAGES
    weights = [OTHERS if enough and groups[i] >= own else 1.0 for i in kept]
    kept_of = lambda one: [one[i] for i in kept]  # noqa: E731
    tuned = None
    if states and recipe.tune.epochs:
        pairs = list(zip(kept_of(passages), kept_of(labels), weights, strict=True))
        few, many = ([(text, label) for text, label, weight in pairs if weight == one] for one in (1.0, OTHERS))
        count = itertools.count(1)
        with logs.progress("tuning the models on passages", recipe.tune.epochs + bool(many)) as advance:
            tuned = TunedPassages.fit(states.models, many, few, recipe.tune, lambda: advance(next(count), ""))

    def reads(texts: Sequence[str]) -> Floats:
        assert states
        with logs.progress("reading passages", len(texts)) as advance:
            return states.of_passages(texts, advance)

    tagger = SectionTagger(reads if states else None, tuned)
    return tagger.fit(kept_of(passages), kept_of(labels), kept_of(groups), weights)
