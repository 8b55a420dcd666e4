"""What must not be known before the test: a run that leaks stops here, before anything is learned.

a patient in two splits                    their notes resemble each other
a patient whom the language model has read Huang et al.'s first version had that; worth about 0.05 AUROC
a note that is nearly one of another split copied texts, other people's ids
a note from after the moment of prediction the tasks read none (tasks/mimic.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.errors import DataError
from downstream.tasks.examples import Example
from pretrain.run import Trained, hashed
from sharding import dedup

Splits = Mapping[str, Sequence[Example]]

SIMILARITY = 0.8  # Jaccard, of runs of five words
BAND = 4  # bins of a sketch that must agree for two notes to be compared: at 0.8 one of 32 does in all but 10^-7


def check_patients(splits: Splits) -> None:
    """Raises DataError where two splits share a patient."""
    seen: dict[str, str] = {}
    for name, examples in splits.items():
        for patient in {example.patient_id for example in examples}:
            if patient in seen:
                raise DataError(
                    f"patient {patient} is in {seen[patient]} and in {name}; splits must not share patients"
                )
            seen[patient] = name


def check_unseen(splits: Splits, trained: Trained) -> None:
    """Raises DataError where the language model has read what it will be scored on: a patient of the test set whom it
    was trained or validated on, or one of the validation set whom it was trained on.
    """
    for name, read in (("test", ("train", "valid")), ("valid", ("train",))):
        seen = frozenset[str]().union(*(trained.patients.get(split, frozenset()) for split in read))
        ids = {example.patient_id for example in splits[name]}
        if known := sorted(patient for patient in ids if hashed(patient) in seen):
            raise DataError(
                f"{trained.run}: {len(known):,} of the {len(ids):,} patients of {name} (such as {known[0]}) are among "
                "those whose notes the language model has read; shard with the same [splits] as here, or set "
                "others=true where the same ids are other people"
            )


def copies(folds: Sequence[Splits]) -> list[tuple[str, Example, str, Example]]:
    """(split, note, another split, the note there that it is nearly the same as), one for each such note, of the first
    fold that parts the two.
    """
    first_with: dict[str, Example] = {}
    for splits in folds:
        for examples in splits.values():
            for example in examples:
                first_with.setdefault(f"{example.patient_id}\0{example.text}", example)
    notes = list(first_with.values())
    where = [
        {example.patient_id: name for name, examples in splits.items() for example in examples} for splits in folds
    ]
    found = []
    for note, other in alike([example.text for example in notes]):
        for split_of in where:
            names = split_of.get(notes[note].patient_id), split_of.get(notes[other].patient_id)
            if None not in names and names[0] != names[1]:
                found.append((str(names[0]), notes[note], str(names[1]), notes[other]))
                break
    return found


def alike(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(a text, an earlier one that it is nearly the same as): of all earlier ones every such pair."""
    sketches_NS = _sketches(texts)
    buckets: dict[bytes, list[int]] = {}
    found = []
    for note, sketch_S in enumerate(sketches_NS):
        near: set[int] = set()
        for start in range(0, dedup.SKETCH_BINS, BAND):
            band_S = sketch_S[start : start + BAND]
            if band_S.all():
                bucket = buckets.setdefault(start.to_bytes(2, "little") + band_S.tobytes(), [])
                near.update(bucket)
                bucket.append(note)
        others = np.array(sorted(near), dtype=np.int64)
        if len(others):
            shared = dedup.similarity(sketch_S, sketches_NS[others])
            found += [(note, int(other)) for other in others[shared >= SIMILARITY]]
    return found


def check_copies(folds: Sequence[Splits]) -> None:
    """Raises DataError where a note is nearly the same as one of another split."""
    if found := copies(folds):
        name, example, other, there = found[0]
        raise DataError(
            f"{len(found):,} notes are nearly the same as one of another split, such as {example.example_id} in {name} "
            f"and {there.example_id} in {other}; give both to one patient, take one out, or set copies=true"
        )


def check_unlabelled(test: Sequence[Example], notes: Sequence[tuple[str, str]]) -> None:
    """Raises DataError where the language model would read a note ((patient, text)) that is nearly one of test."""
    texts = {example.text: example for example in test}
    tested = len(texts)
    pairs = alike([*texts, *(text for _, text in notes)])
    if found := [(note - tested, other) for note, other in pairs if note >= tested > other]:
        note, other = found[0]
        raise DataError(
            f"[lm]: {len(found):,} notes of lm.notes are nearly the same as one of test, such as one of patient "
            f"{notes[note][0]} and {list(texts.values())[other].example_id}; give both one patient, take one out, or "
            "set copies=true"
        )


def _sketches(texts: Sequence[str]) -> np.ndarray:
    """uint16 [notes, bins], as sharding compares notes of a patient."""
    ids: dict[str, int] = {}
    words = [[ids.setdefault(word, len(ids)) for word in text.split()] for text in texts]
    offsets = np.cumsum([0, *map(len, words)])
    flat = np.fromiter((word for note in words for word in note), dtype=np.int64, count=int(offsets[-1]))
    return dedup.sketches(dedup.word_hashes(dedup.folded(list(ids))), flat, offsets)
