"""Every mention tested once, by what has not seen its document: the reader, and what a user would pick instead.

reader   all that the recipe gives       rules   ConText's, nothing learned
untuned  models that learned no spans    words   TF-IDF of the words beside the mention with logistic regression
plain    without the language model      alone   nothing learned from other corpora
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from cluster import logs
from cluster.errors import DataError
from downstream.concepts.attributes import Attribute
from downstream.concepts.cues import DEFAULTS
from downstream.concepts.features import Examples
from downstream.concepts.regression import LeftOut
from downstream.concepts.score import f1_gain, prf
from downstream.concepts.tuned import Tuner
from downstream.metrics import Ints

SYSTEMS = {
    "reader": "reader",
    "untuned": "models not tuned",
    "alone": "nothing beside",
    "plain": "no language model",
    "rules": "rules",
    "words": "TF-IDF beside it",
}

Said = dict[str, np.ndarray]


class Fold(NamedTuple):
    """Mentions to learn from, those that are asked, which of all the latter are, and those of other corpora."""

    known: Examples
    asked: Examples
    held: Ints
    others: Examples | None = None


def asked_about(examples: Examples, groups: np.ndarray, folds: int) -> list[str]:
    """The attributes of which there is something to learn. Raises DataError where one is in too few groups to fold."""
    names = []
    for name in sorted({name for span in examples.spans for name in span.attributes}):
        having = np.array([name in span.attributes for span in examples.spans])
        values = {span.attributes[name] for span in examples.spans if name in span.attributes}
        if len(values) < 2:
            logs.say(f"{name}: all {having.sum():,} mentions are {values.pop()}; left to the rules")
        elif (count := len(set(groups[having]))) < folds:
            raise DataError(f"{name}: only {count} documents have it, too few for folds={folds}")
        else:
            names.append(name)
    return names


def folded(
    examples: Examples,
    groups: np.ndarray,
    folds: int,
    seed: int,
    tuner: Tuner | None = None,
    others: Examples | None = None,
) -> list[Fold]:
    """Every mention asked once, in a fold without its group; values as evenly as groups allow. With a tuner (the
    mentions are all of its notes) models are tuned for every fold. From `others`, mentions of other corpora, is learned
    in every fold.
    """
    values = np.array(["|".join(f"{k}={v}" for k, v in sorted(span.attributes.items())) for span in examples.spans])
    cutter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # values with fewer mentions than folds
        cuts = [(np.sort(rows), np.sort(held)) for rows, held in cutter.split(values, values, groups)]
    found = []
    for rows, held in cuts:
        known, asked = examples.rows(rows), examples.rows(held)
        if tuner:
            asked = tuner.read(tuner.fit(known.documents), asked)
            known = tuner.crossed(known)
        found.append(Fold(known, asked, held, others))
    return found


def tested(
    names: Sequence[str], examples: Examples, cut: Sequence[Fold], passed: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """By "attribute:value" and system precision, recall and F1; for other systems the reader's F1 beyond theirs.
    `passed` hears the attribute of every fold that is done.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        rows = [i for i, span in enumerate(examples.spans) if name in span.attributes]
        truth = np.array([examples.spans[i].attributes[name] for i in rows])
        said = {system: one[rows] for system, one in out_of_fold(cut, name, passed=passed).items()}
        documents = examples.documents[rows].tolist()
        for value in sorted(set(truth) - {DEFAULTS.get(name, "")}):
            found[f"{name}:{value}"] = scored(truth == value, {k: one == value for k, one in said.items()}, documents)
    _show(found)
    return found


def out_of_fold(
    cut: Sequence[Fold], name: str, seed: int = 0, few: int = 0, passed: Callable[[str], None] | None = None
) -> Said:
    """What every system says of an attribute, each mention that has it by what has not seen its group ("" for the
    others); with `few` only so many mentions of the other folds are learned from. `passed` hears the name after every
    fold.
    """
    learners: dict[str, Callable[[Examples], Examples]] = {"reader": lambda every: every}
    if cut[0].known.tuned:
        learners["untuned"] = lambda every: every._replace(tuned={})
    if cut[0].others:
        learners["alone"] = lambda every: every
    if cut[0].known.states_NP.shape[1]:
        learners["plain"] = Examples.without_states

    def said_of(fold: Fold) -> Said:
        known, asked = fold.known.having(name), fold.asked.having(name)
        if few:
            known = known.rows(np.sort(np.random.default_rng(seed).permutation(len(known.spans))[:few]))
        truth = np.array([span.attributes[name] for span in known.spans])
        values: Said = {}
        if len(set(truth)) < 2:
            values = dict.fromkeys((*learners, "words"), np.full(len(asked.spans), truth[0] if len(truth) else ""))
        else:
            left_out: LeftOut = {}
            for system, told in learners.items():
                others = told(fold.others) if fold.others and system != "alone" else None
                # Only without the language model are the regressions others than the reader's.
                attribute = Attribute.fit(told(known), name, others, {} if system == "plain" else left_out)
                values[system] = np.array(attribute.classes)[attribute(told(asked), name)[1]]
            values["words"] = _tfidf(known.beside, truth, asked.beside)
        return values | {"rules": np.array([mention.rules.get(name, "") for mention in asked.mentions])}

    said = {system: np.full(sum(len(fold.held) for fold in cut), "", object) for system in SYSTEMS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # liblinear lets others calculate meanwhile
        for fold, values in zip(cut, pool.map(said_of, cut), strict=True):
            held = fold.held[[name in span.attributes for span in fold.asked.spans]]
            for system, one in values.items():
                said[system][held] = one
            if passed:
                passed(name)
    return {system: said[system] for system in SYSTEMS if system in (*learners, "rules", "words")}


def _tfidf(learned: Sequence[str], truth: np.ndarray, asked: Sequence[str]) -> np.ndarray:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
    used = {"solver": "liblinear"} if len(set(truth)) == 2 else {"max_iter": 1000}
    one = LogisticRegression(C=10, class_weight="balanced", **used)
    one.fit(words.fit_transform(learned), truth)
    return np.asarray(one.predict(words.transform(asked)))


def scored(truth: np.ndarray, said: Mapping[str, np.ndarray], documents: Sequence[str]) -> dict[str, Any]:
    """By system precision, recall and F1 with its interval; for those beside the reader also its gain over them."""
    found = {name: prf(truth, one, documents) for name, one in said.items()}
    for name, one in said.items():
        if name != "reader":
            found[name]["reader_gain"] = f1_gain(truth, said["reader"], one, documents)
    return found


def _show(found: Mapping[str, Mapping[str, Any]]) -> None:
    lines = []
    for value, systems in found.items():
        for name, one in systems.items():
            gain = one.get("reader_gain")
            lines.append(
                [
                    value if name == "reader" else "",
                    SYSTEMS[name],
                    *(f"{100 * one[key]:.1f}" for key in ("precision", "recall")),
                    f"{100 * one['f1']:.1f} [{100 * one['f1_low']:.1f}, {100 * one['f1_high']:.1f}]",
                    "{:+.1f} [{:.1f}, {:.1f}]".format(*(100 * part for part in gain)) if gain else "",
                    f"{one['n']:,}" if name == "reader" else "",
                ]
            )
    title = "every mention by what has not seen its document; 95% intervals over documents"
    logs.table(title, ["value", "system", "P", "R", "F1", "reader beyond it", "mentions"], lines)
