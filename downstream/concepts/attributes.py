"""What is said of a mention, learned: one logistic regression for each attribute (regression.py).

Attributes are learned from the spans that have them, so that corpora that label other things train together. With few
labels the rules carry it; with many the words correct them. Mentions of other corpora may be learned from besides: what
is said of a disease there is written otherwise and annotated otherwise, so each counts little, as much as helps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from downstream.concepts.features import BUCKETS, Examples
from downstream.concepts.regression import LeftOut, Regression, mix, truth_of, tuned_logs
from downstream.metrics import Floats, Ints

FEW = 5  # mentions of a label; of one with fewer nothing is concluded
SAYS = 0.95  # of a label's mentions have another value than most: it says the value itself; some are annotated wrongly
ARRAYS = ("rows", "weights", "states", "bias", "offsets", "share")


class Attribute(NamedTuple):
    """A learned attribute. Where labels help, a mention with one of those that were learned from is read by `told`."""

    classes: tuple[str, ...]
    general: Regression
    told: Regression | None = None
    labels: frozenset[str] = frozenset()

    @classmethod
    def fit(
        cls, examples: Examples, name: str, others: Examples | None = None, left_out: LeftOut | None = None
    ) -> Attribute:
        """Learned from the examples, which all have the attribute, of at least two values, and from those of others
        that have one of these values. One `left_out`, empty at first, for several of the same examples and others (or
        none), or with other tuned models, spares them the same calculations.
        """
        truth = truth_of(examples, name)
        classes = tuple(map(str, np.unique(truth)))
        if others:
            places = [i for i, span in enumerate(others.spans) if span.attributes.get(name) in classes]
            others = others.rows(np.array(places)) if places else None
        found = cls(classes, Regression.fit(examples, name, False, others, left_out))
        labels = _labels_that_help(examples, truth)
        if not labels:
            return found
        return found._replace(told=Regression.fit(examples, name, True, others, left_out), labels=labels)

    def __call__(self, examples: Examples, name: str) -> tuple[Floats, Ints]:
        """Log-probabilities [N, classes], and of each mention the place in `classes` of the chosen value."""
        tuned_NK = tuned_logs(examples, name, self.classes)
        logs_NK = mix(self.general.logs(examples), tuned_NK, self.general.share)
        offsets_NK = np.tile(self.general.offsets_K, (len(logs_NK), 1))
        if self.told:
            known = np.array([span.label in self.labels for span in examples.spans])
            logs_NK[known] = mix(self.told.logs(examples), tuned_NK, self.told.share)[known]
            offsets_NK[known] = self.told.offsets_K
        return logs_NK, (logs_NK + offsets_NK).argmax(1)


def _labels_that_help(examples: Examples, truth: np.ndarray) -> frozenset[str]:
    """The labels, where there are two or more and none says the value itself, as MACCROBAT's History does: notes to be
    read would not have that one.
    """
    labels = np.array([span.label for span in examples.spans])
    names, counts = np.unique(labels, return_counts=True)
    values, times = np.unique(truth, return_counts=True)
    usual = values[times.argmax()]
    known = names[counts >= FEW]
    if len(known) < 2 or any((truth[labels == name] != usual).mean() >= SAYS for name in known):
        return frozenset()
    return frozenset(map(str, known))


class Attributes:
    """Learned attributes by name."""

    def __init__(self, learned: dict[str, Attribute]):
        self.learned = learned

    @classmethod
    def fit(
        cls, examples: Examples, others: Examples | None = None, passed: Callable[[str], None] | None = None
    ) -> Attributes:
        """One for each attribute of which two values occur in the examples; other attributes are left to the rules.
        `passed` hears the name of each that is learned.
        """
        havings = {
            name: examples.having(name)
            for name in sorted({name for span in examples.spans for name in span.attributes})
        }
        names = [name for name, having in havings.items() if len({span.attributes[name] for span in having.spans}) > 1]
        found = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # solvers let others calculate meanwhile
            for name, one in zip(names, pool.map(lambda n: Attribute.fit(havings[n], n, others), names), strict=True):
                found[name] = one
                if passed:
                    passed(name)
        return cls(found)

    def __call__(self, examples: Examples) -> list[tuple[dict[str, str], dict[str, float]]]:
        """For every mention its values and their probabilities; what was not learned is what the rules say."""
        said = [(dict(mention.rules), dict[str, float]()) for mention in examples.mentions]
        for name, attribute in self.learned.items():
            logs_NK, best_N = attribute(examples, name)
            for (values, scores), logs_K, best in zip(said, logs_NK, best_N, strict=True):
                values[name], scores[name] = attribute.classes[best], round(float(np.exp(logs_K[best])), 4)
        return said

    def hear_tuned(self) -> bool:
        """Whether what tuned models say counts anywhere."""
        parts = [part for one in self.learned.values() for part in (one.general, one.told) if part]
        return any(part.share for part in parts)

    def arrays(self) -> dict[str, Any]:
        """All of it as arrays: only the buckets that weigh anything are kept."""
        about = {name: (one.classes, sorted(one.labels)) for name, one in self.learned.items()}
        found: dict[str, Any] = {"attributes": np.frombuffer(json.dumps(about).encode(), np.uint8)}
        for name, attribute in self.learned.items():
            for part, one in (("general", attribute.general), ("told", attribute.told)):
                if one:
                    rows = np.flatnonzero(np.abs(one.weights_BK).max(1) > 1e-9)
                    arrays = [rows, one.weights_BK[rows].astype(np.float32), *one[2:]]
                    found |= {f"{name}.{part}.{key}": array for key, array in zip(ARRAYS, arrays, strict=True)}
        return found

    @classmethod
    def of(cls, arrays: Any) -> Attributes:
        """The learned attributes of such arrays."""

        def regression(name: str, kinds: bool) -> Regression:
            part = "told" if kinds else "general"
            rows, kept, states_PK, bias_K, offsets_K, share = (arrays[f"{name}.{part}.{key}"] for key in ARRAYS)
            weights_BK = np.zeros((BUCKETS, kept.shape[1]))
            weights_BK[rows] = kept
            return Regression(kinds, weights_BK, states_PK, bias_K, offsets_K, float(share))

        found = {}
        for name, (classes, labels) in json.loads(bytes(arrays["attributes"])).items():
            told = regression(name, kinds=True) if labels else None
            found[name] = Attribute(tuple(classes), regression(name, kinds=False), told, frozenset(labels))
        return cls(found)
