"""Who is learned from and who is tested: one cut by the corpus' split, or every patient tested in turn.

    folds = 0         train, valid, test as the language model's corpus was split (sharding.splits)
    folds = 5         stratified group k-fold: every patient is tested once a repeat, by a model that has not seen them
    folds_file        a table of patient and fold: as somebody else has cut them, so that results compare

For a few hundred labels one cut says little: of 195 patients, 39 tested are good for ±14 points. Within a fold a
fifth of the patients that are not tested is for validation. `labels` keeps so many labelled notes of those (training
and validation together), drawn class by class; the others stay without their labels.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from cluster.errors import ConfigError, DataError
from downstream.tasks.examples import Cohort, Example
from downstream.tasks.table import rows
from sharding.splits import SplitConfig, split_of

VALID_PARTS = 5  # one of so many parts of a fold's patients validates


class Fold(NamedTuple):
    """Examples of one cut; `rest` are those whose labels are not used. `held_out`: patients no part of it may read."""

    name: str
    train: list[Example]
    valid: list[Example]
    test: list[Example]
    rest: list[Example]
    held_out: frozenset[str]

    def splits(self) -> dict[str, list[Example]]:
        """Train, valid, test by name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}


def by_corpus(cohort: Cohort, splits: SplitConfig) -> list[Fold]:
    """The one cut of the corpus."""
    found: dict[str, list[Example]] = {"train": [], "valid": [], "test": []}
    for example in cohort.examples:
        found[split_of(example.patient_id, splits)].append(example)
    held_out = frozenset(example.patient_id for name in ("valid", "test") for example in found[name])
    return [Fold("all", found["train"], found["valid"], found["test"], [], held_out)]


def k_folds(cohort: Cohort, folds: int, repeats: int, labels: int | None, seed: int) -> list[Fold]:
    """`folds` × `repeats` cuts. Raises DataError where a class has fewer patients than there are folds."""
    strata = _strata(cohort)
    patients = np.array([example.patient_id for example in cohort.examples])
    for stratum in np.unique(strata):
        if (count := len(set(patients[strata == stratum]))) < folds and not cohort.several:
            raise DataError(
                f"class {cohort.classes[stratum]!r} has {count} patients, too few for folds={folds}; take fewer folds, "
                "or leave the class out"
            )
    found = []
    for repeat in range(repeats):
        cutter = StratifiedGroupKFold(folds, shuffle=True, random_state=_number(seed, "repeat", repeat))
        for fold, (learned, tested) in enumerate(cutter.split(strata, strata, patients)):
            name = f"{repeat + 1}.{fold + 1}" if repeats > 1 else f"{fold + 1}"
            found.append(_fold(name, cohort, strata, learned, tested, labels, seed))
    return found


def from_file(cohort: Cohort, url: str, labels: int | None, seed: int) -> list[Fold]:
    """The cuts of a file. Raises DataError for a patient it does not name."""
    fold_of = {row[0]: row[1] for row in rows(url, ["patient", "fold"])}
    if missing := next((e.patient_id for e in cohort.examples if e.patient_id not in fold_of), None):
        raise DataError(f"{url}: has no fold for patient {missing}; every patient of the task needs one")
    names = sorted(set(fold_of.values()))
    if len(names) < 2:
        raise DataError(f"{url}: has {len(names)} fold; at least 2 are needed")
    strata = _strata(cohort)
    here = np.array([fold_of[example.patient_id] for example in cohort.examples])
    found = []
    for name in names:
        learned, tested = np.flatnonzero(here != name), np.flatnonzero(here == name)
        fold = _fold(name, cohort, strata, learned, tested, labels, seed)
        found.append(fold._replace(held_out=frozenset(p for p, f in fold_of.items() if f == name)))
    return found


def _strata(cohort: Cohort) -> np.ndarray:
    """What is kept in proportion: the class; with several labels a note, the rarest of them."""
    sets = [example.label for example in cohort.examples if isinstance(example.label, tuple)]
    if not sets:
        return np.array([example.label for example in cohort.examples])
    counts = np.bincount([label for labels in sets for label in labels], minlength=len(cohort.classes))
    return np.array([min(labels, key=lambda one: counts[one]) if labels else len(counts) for labels in sets])


def _fold(
    name: str,
    cohort: Cohort,
    strata: np.ndarray,
    learned: np.ndarray,
    tested: np.ndarray,
    labels: int | None,
    seed: int,
) -> Fold:
    order = np.random.default_rng(_number(seed, "labels", name))
    if labels is not None:
        if labels > len(learned):
            raise ConfigError(f"labels={labels}: fold {name} has only {len(learned)} notes to learn from")
        kept = _drawn(strata[learned], labels, order)
    else:
        kept = np.arange(len(learned))
    chosen = learned[kept]
    patients = np.array([cohort.examples[i].patient_id for i in chosen])
    cutter = StratifiedGroupKFold(VALID_PARTS, shuffle=True, random_state=_number(seed, "valid", name))
    try:
        train, valid = next(iter(cutter.split(strata[chosen], strata[chosen], patients)))
    except ValueError:
        raise DataError(
            f"fold {name}: {len(chosen)} labelled notes are too few to validate on a fifth of them"
        ) from None
    pick = lambda places: [cohort.examples[i] for i in places]  # noqa: E731
    return Fold(
        name,
        pick(chosen[train]),
        pick(chosen[valid]),
        pick(tested),
        pick(np.setdiff1d(learned, chosen)),
        frozenset(cohort.examples[i].patient_id for i in tested),
    )


def _drawn(strata: np.ndarray, count: int, order: np.random.Generator) -> np.ndarray:
    """`count` places, of each class in proportion (the largest remainders get the odd ones), in ascending order."""
    names, sizes = np.unique(strata, return_counts=True)
    exact = sizes * count / len(strata)
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: count - shares.sum()]] += 1
    drawn = [
        order.permutation(np.flatnonzero(strata == name))[:share] for name, share in zip(names, shares, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def _number(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def show_counts(folds: Sequence[Fold]) -> str:
    """One line: how many notes are learned from and tested."""
    counts = [(len(fold.train), len(fold.valid), len(fold.test)) for fold in folds]
    spans = [
        f"{min(ns):,}" if min(ns) == max(ns) else f"{min(ns):,} to {max(ns):,}" for ns in zip(*counts, strict=True)
    ]
    return f"{len(folds)} folds: {spans[0]} notes to train on, {spans[1]} to validate on, {spans[2]} to test on in each"
