"""Every mention tested once, by what has not seen its document: the reader, and what a user would pick instead.

reader   all that the recipe gives     plain   the same without the language model
rules    ConText's, nothing learned    words   TF-IDF of the words beside the mention with logistic regression
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from cluster import logs
from cluster.errors import DataError
from downstream.concepts.attributes import Attribute
from downstream.concepts.cues import DEFAULTS
from downstream.concepts.features import Examples
from downstream.concepts.score import f1_gain, prf

SYSTEMS = {"reader": "reader", "plain": "no language model", "rules": "rules", "words": "TF-IDF beside it"}

Said = dict[str, np.ndarray]


def tested(examples: Examples, groups: Mapping[str, str], folds: int, seed: int) -> dict[str, dict[str, Any]]:
    """By "attribute:value" and system precision, recall and F1; for the others the reader's F1 beyond theirs."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({name for span in examples.spans for name in span.attributes}):
        having = examples.having(name)
        truth = np.array([span.attributes[name] for span in having.spans])
        if len(set(truth)) < 2:
            logs.say(f"{name}: all {len(truth):,} mentions are {truth[0]}; left to the rules")
            continue
        group_of = np.array([groups[document] for document in having.documents])
        if len(set(group_of)) < folds:
            raise DataError(f"{name}: only {len(set(group_of))} documents have it, too few for folds={folds}")
        documents = having.documents.tolist()
        said = out_of_fold(having, name, group_of, folds, seed)
        for value in sorted(set(truth) - {DEFAULTS.get(name, "")}):
            found[f"{name}:{value}"] = scored(truth == value, {k: one == value for k, one in said.items()}, documents)
    _show(found)
    return found


def out_of_fold(examples: Examples, name: str, groups: np.ndarray, folds: int, seed: int, few: int = 0) -> Said:
    """What every system says of an attribute, each mention by what has not seen its group; with `few` only so many
    mentions of the other folds are learned from.
    """
    truth = np.array([span.attributes[name] for span in examples.spans])
    said = {
        system: truth.copy() for system in ("reader", *(("plain",) if examples.states_NP.shape[1] else ()), "words")
    }
    said["rules"] = np.array([mention.rules.get(name, "") for mention in examples.mentions])
    cutter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a value with fewer mentions than folds
        cuts = list(cutter.split(truth, truth, groups))
    for rows_, held in cuts:
        learned = np.sort(np.random.default_rng(seed).permutation(rows_)[:few]) if few else rows_
        if len(set(truth[learned])) < 2:
            for one in said.values():
                one[held] = truth[learned[0]]
            continue
        known, asked = examples.rows(learned), examples.rows(held)
        for system, k, a in (("reader", known, asked), ("plain", known.without_states(), asked.without_states())):
            if system in said:
                attribute = Attribute.fit(k, name)
                said[system][held] = np.array(attribute.classes)[attribute(a)[1]]
        said["words"][held] = _tfidf(known.beside, truth[learned], asked.beside)
    return {system: said[system] for system in SYSTEMS if system in said}


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
