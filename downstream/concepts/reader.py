"""What was learned of how notes are read, as one file: attributes, a section tagger, and whose states they stand on.

The language models themselves stay in their runs; the file names them, and the checkpoints it was learned with. Where
they were tuned, their other weights are in the file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from cluster import storage
from cluster.errors import DataError
from downstream.concepts.attributes import Attributes
from downstream.concepts.features import Examples, Mention
from downstream.concepts.passages import TunedPassages
from downstream.concepts.schema import Note, Span
from downstream.concepts.states import States
from downstream.concepts.tagger import SectionTagger
from downstream.concepts.tuned import Tuned
from downstream.frozen import npz
from pretrain.run import load_trained

FILE = "reader.npz"
RULES = "rules"


class Reader(NamedTuple):
    """What reads notes; without anything learned it is the rules."""

    attributes: Attributes
    states: States | None = None
    tagger: SectionTagger | None = None
    tuned: Tuned | None = None

    def __call__(
        self, note: Note, spans: Sequence[Span], mentions: list[Mention]
    ) -> list[tuple[dict[str, str], dict[str, float]]]:
        """For every mention its values by attribute, and their probabilities where they were learned."""
        if not mentions or not self.attributes.learned:
            return [(dict(mention.rules), {}) for mention in mentions]
        places = [(span.start, span.end) for span in spans]
        states_NP = self.states(note.text, places) if self.states else np.zeros((len(spans), 0))
        examples = Examples.seen(mentions, spans, np.repeat(note.doc_id, len(spans)), states_NP)
        return self.attributes(examples._replace(tuned=self.tuned(note.text, places)) if self.tuned else examples)

    def save(self, url: str) -> None:
        """Writes it, without any word of a note but those that the tagger weighs."""
        arrays: dict[str, Any] = self.attributes.arrays()
        runs = [(one.run, one.checkpoint_sha256) for one in self.states.models] if self.states else []
        arrays["runs"] = np.frombuffer(json.dumps(runs).encode(), np.uint8)
        if self.tuned:
            arrays |= self.tuned.arrays()
        if self.tagger:
            arrays["tagger"] = np.frombuffer(self.tagger.save(), np.uint8)
            if self.tagger.tuned:
                arrays |= self.tagger.tuned.arrays()
        storage.write_bytes(url, npz(arrays))

    @classmethod
    def load(cls, url: str) -> Reader:
        """From 'rules', a file, or the folder of a fine-tuning. Raises DataError; ConfigError where a run is gone."""
        if url == RULES:
            return cls(Attributes({}))
        place = url if url.endswith(".npz") else storage.join(url, FILE)
        if not storage.exists(place):
            raise DataError(f"{url}: has no reader; ./launch.sh finetune recipes/concepts/train.toml makes one")
        damaged = DataError(f"{place}: is no reader, or damaged; finetune makes it again")
        try:
            arrays = np.load(io.BytesIO(storage.read_bytes(place)), allow_pickle=False)
            attributes, runs = Attributes.of(arrays), json.loads(bytes(arrays["runs"]))
        except (ValueError, KeyError, BadZipFile, EOFError):
            raise damaged from None
        models = [load_trained(run) for run, _ in runs]
        for model, (run, known) in zip(models, runs, strict=True):
            if model.checkpoint_sha256 != known:
                raise DataError(
                    f"{place}: was learned with another checkpoint of {run}; finetune again, or bring it back"
                )
        states, tagger, tuned, passages = States(models) if models else None, None, None, None
        try:
            if states and f"{Tuned.PREFIX}.classes" in arrays:
                tuned = Tuned.load(arrays, states.models)
            if states and f"{TunedPassages.PREFIX}.classes" in arrays:
                passages = TunedPassages.load(arrays, states.models)
            if "tagger" in arrays:
                tagger = SectionTagger.load(bytes(arrays["tagger"]), states.of_passages if states else None, passages)
        except (ValueError, KeyError, RuntimeError):
            raise damaged from None
        return cls(attributes, states, tagger, tuned)
