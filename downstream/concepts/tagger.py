"""Which section a passage without heading is of, learned from passages that have one.

    He quit smoking.  Mother had MS.      social_history       │ family_history

A linear SVM over words, characters, clues and, where there is one, a language model's states, beside it models that
were tuned on such passages (passages.py); successive sentences are smoothed, so that a section is a stretch.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC

from downstream.concepts.sections import SectionSpan, find, labels, read_headings

Passages = Sequence[str] | NDArray[np.object_]
Reads = Callable[[Sequence[str]], NDArray[np.floating]]  # States.of_passages

UNHEADED = 200  # characters: a stretch without heading that is longer is read
STAY = 1.0  # log-odds for the next sentence to be in the same section
_SENTENCE_END = re.compile(r"(?<=[.!?])(?:\s+|,(?=\S))|\n+")


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    return {name: re.compile(pattern, re.IGNORECASE) for name, pattern in read_headings()["clues"].items()}


class Tuned(Protocol):
    """Models that were tuned on passages (passages.py)."""

    @property
    def names(self) -> tuple[str, ...]:
        """The sections that they know."""

    def __call__(self, texts: Sequence[str]) -> NDArray[np.floating]:
        """Log-probabilities [N, sections]."""

    def arrays(self) -> dict[str, Any]:
        """All of it."""


class SectionTagger:
    """Which section a passage without heading is of: a linear SVM over its words, characters and clues, and over what
    `reads` makes of it, if it is given. What models say that were tuned on the same sections counts half, if there are
    any: the SVM knows rare words, they know what stands for them.
    """

    def __init__(self, reads: Reads | None = None, tuned: Tuned | None = None) -> None:
        self.names: tuple[str, ...] = ()
        self.tuned = tuned
        self._reads = reads
        self._mean, self._deviation = np.zeros(0), np.ones(0)  # of what it makes of the passages that were learned
        self._seen: dict[str, TfidfVectorizer] = {}
        self._weights: NDArray[np.floating] = np.empty((0, 0))  # one row a label; the last column is the intercept
        self._sharpness = 1.0

    def fit(
        self,
        texts: Sequence[str],
        labels: Sequence[str],
        groups: Sequence[Any] | None = None,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> SectionTagger:
        """Itself, fitted. Its probabilities are calibrated by cross-validation, the passages of a group together. By
        `weights` passages of another source count less.

        Raises ValueError for fewer than two labels, other labels than those of tuned models, or lengths that differ.
        """
        if any(len(one) != len(texts) for one in (labels, groups, weights) if one is not None):
            raise ValueError(f"{len(texts)} texts but {len(labels)} labels, or groups or weights of another length")
        if len(set(labels)) < 2:
            raise ValueError("a tagger needs passages of two labels or more")
        self.names = tuple(sorted(set(labels)))
        if self.tuned and self.tuned.names != self.names:
            raise ValueError("the models were tuned on passages with other labels")
        truth = np.array([self.names.index(label) for label in labels])
        passages, counts = np.array(texts, dtype=object), np.ones(len(texts)) if weights is None else np.array(weights)
        states_NP = self._states(texts)
        outputs = np.full((len(texts), len(self.names)), -1.0)
        parts = (StratifiedKFold if groups is None else StratifiedGroupKFold)(3, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a label with fewer passages than folds
            folds = list(parts.split(passages, truth, groups)) if len(texts) >= 30 else []
        for learn, held in folds:
            if len(set(truth[learn])) > 2:
                known = self._learn(passages[learn], states_NP[learn], truth[learn], counts[learn], seed)
                outputs[np.ix_(held, known)] = self._outputs(passages[held], states_NP[held])
        tried = np.geomspace(0.5, 16, 26)
        losses = [-np.log(_softmax(outputs * sharp)[np.arange(len(truth)), truth]) @ counts for sharp in tried]
        self._sharpness = float(tried[int(np.argmin(losses))]) if folds else 3.0
        self._learn(passages, states_NP, truth, counts, seed)
        return self

    def _states(self, texts: Sequence[str]) -> NDArray[np.floating]:
        return self._reads(texts) if self._reads else np.zeros((len(texts), 0))

    def _learn(
        self,
        texts: Passages,
        states_NP: NDArray[np.floating],
        truth: NDArray[np.integer],
        counts: NDArray[np.floating],
        seed: int,
    ) -> NDArray[np.integer]:
        self._mean, self._deviation = states_NP.mean(0), states_NP.std(0) + 1e-6
        self._seen = _vectorizers()
        for name, seen in self._seen.items():
            seen.fit(_clues(texts) if name == "clues" else texts)
        known, places = np.unique(truth, return_inverse=True)
        sizes = np.bincount(places, counts)
        rare = np.sqrt(sizes.mean() / sizes)[places]  # halfway to balanced
        svm = LinearSVC(C=1.0, max_iter=3000, tol=1e-3, random_state=seed)
        svm.fit(self._features(texts, states_NP), truth, sample_weight=counts * rare)
        weights = np.column_stack([svm.coef_, svm.intercept_]).astype(np.float32)
        self._weights = weights if len(weights) > 1 else np.vstack([-weights, weights])
        return np.asarray(known)

    def _features(self, texts: Passages, states_NP: NDArray[np.floating]) -> sparse.csr_matrix:
        read = [seen.transform(_clues(texts) if name == "clues" else texts) for name, seen in self._seen.items()]
        # all of one length, as the words: all states together count as they do
        states = [normalize((states_NP - self._mean) / self._deviation)] if len(self._mean) else []
        return sparse.hstack([*read, *map(sparse.csr_matrix, states)]).tocsr()

    def _outputs(self, texts: Passages, states_NP: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.asarray(self._features(texts, states_NP) @ self._weights[:, :-1].T + self._weights[:, -1])

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.floating]:
        """For each text a row with the probability of each of `names`. Raises ValueError where it was not fitted."""
        if not self.names:
            raise ValueError("the section tagger was not fitted")
        if not len(texts):
            return np.empty((0, len(self.names)))
        chances = _softmax(self._outputs(texts, self._states(texts)) * self._sharpness)
        return _softmax((np.log(chances + 1e-9) + self.tuned(texts)) / 2) if self.tuned else chances

    def predict(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """For each text its label and that label's probability. Raises ValueError where it was not fitted."""
        return [(self.names[int(row.argmax())], float(row.max())) for row in self.probabilities(texts)]

    def save(self) -> bytes:
        """The tagger as an npz archive without pickles. Raises ValueError where it was not fitted."""
        if not self.names:
            raise ValueError("the section tagger was not fitted")
        words = {name: list(seen.get_feature_names_out()) for name, seen in self._seen.items()}
        said = json.dumps(
            {"names": self.names, "sharpness": self._sharpness, "words": words, "tuned": self.tuned is not None}
        ).encode()
        out = io.BytesIO()
        idf = {f"idf_{name}": seen.idf_.astype(np.float32) for name, seen in self._seen.items()}
        arrays = {"weights": self._weights, "mean": self._mean, "deviation": self._deviation, **idf}
        np.savez_compressed(out, allow_pickle=False, json=np.frombuffer(said, np.uint8), **arrays)
        return out.getvalue()

    @classmethod
    def load(cls, saved: bytes, reads: Reads | None = None, tuned: Tuned | None = None) -> SectionTagger:
        """The tagger that `save` wrote, with the `reads` and tuned models it was fitted with. Raises ValueError for
        anything else.
        """
        tagger = cls(reads, tuned)
        try:
            with np.load(io.BytesIO(saved), allow_pickle=False) as read:
                said = json.loads(read["json"].tobytes())
                tagger.names, tagger._sharpness = tuple(said["names"]), float(said["sharpness"])
                tagger._weights, tagger._mean, tagger._deviation = (
                    read[name] for name in ("weights", "mean", "deviation")
                )
                tagger._seen = _vectorizers(said["words"])
                for name, seen in tagger._seen.items():
                    seen.idf_ = read[f"idf_{name}"]
        except (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError("not a saved section tagger") from error
        if said.get("tuned", False) != (tuned is not None):
            raise ValueError("not a saved section tagger: the tuned models are not those that it was fitted with")
        if tuned and tuned.names != tagger.names:
            raise ValueError("not a saved section tagger: the models were tuned on other labels")
        known = sum(map(len, said["words"].values())) + len(tagger._mean)
        if tagger._weights.shape != (len(tagger.names), 1 + known) or (reads is None) != (len(tagger._mean) == 0):
            raise ValueError("not a saved section tagger: its weights do not fit its words")
        return tagger


def _vectorizers(words: Mapping[str, list[str]] | None = None) -> dict[str, TfidfVectorizer]:
    kinds: dict[str, dict[str, Any]] = {
        "words": {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b|[:?#]", "sublinear_tf": True},
        "signs": {"analyzer": "char_wb", "ngram_range": (2, 5), "sublinear_tf": True, "min_df": 2},
        "clues": {"token_pattern": r"\S+", "binary": True},
    }
    return {name: TfidfVectorizer(**kind, vocabulary=words[name] if words else None) for name, kind in kinds.items()}


def _clues(texts: Passages) -> list[str]:
    """What each text looks like: its length, its first and last words, and the clues of headings.toml."""
    read = []
    for text in texts:
        words, size = re.findall(r"\w+", text.lower()), len(text.split())
        found = [f"length{min(int(np.log2(size + 1) * 1.5), 14)}", *(f"first_{word}" for word in words[:3])]
        sentences = len(re.findall(r"[.!?](?:\s|$)", text))
        found += [f"sentences{min(sentences, 6)}", *(f"last_{word}" for word in words[-1:])]
        found += ["colon"] * (":" in text) + ["list"] * bool(re.match(r"\s*1\.", text))
        for name, pattern in _patterns().items():
            count = len(pattern.findall(text))
            found += [f"has_{name}", f"has_{name}{min(count, 4)}"] if count else [f"no_{name}"]
            found += [f"much_{name}"] * (count > 0.12 * max(size, 1))
        read.append(" ".join(found))
    return read


def _softmax(outputs: NDArray[np.floating]) -> NDArray[np.floating]:
    raised = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _normal(label: str, text: str) -> str:
    if label == "FAM/SOCHX":
        return "family_history" if _patterns()["kin"].search(text) else "social_history"
    return str(read_headings()["mts_dialog"].get(label, label.lower() if label.lower() in labels() else label))


def tag(text: str, tagger: SectionTagger) -> list[SectionSpan]:
    """The sections of `find`, and before the first heading those that the tagger reads where it is far away.

    Labels of MTS-Dialog become those of `find`, any others stay. Raises ValueError where the tagger was not fitted.
    """
    spans = find(text)
    stop = spans[0].start if spans else len(text)
    cuts = [0, *(found.end() for found in _SENTENCE_END.finditer(text, 0, stop) if found.end() < stop), stop]
    if len(text[:stop].strip()) <= UNHEADED:
        return spans
    sentences = [text[start:end] for start, end in pairwise(cuts)]
    chances = tagger.probabilities(sentences)
    names = [tagger.names[place] for place in _smoothed(np.log(chances + 1e-9))]
    told = [_normal(name, sentence) for name, sentence in zip(names, sentences, strict=True)]
    learned: list[SectionSpan] = []
    place = 0
    for label, run in groupby(told):
        size = len(list(run))
        rows = [chances[row, tagger.names.index(names[row])] for row in range(place, place + size)]
        score = float(np.mean(rows))
        learned.append(SectionSpan(cuts[place], cuts[place + size], label, None, "learned", score))
        place += size
    return learned + spans


def _smoothed(scores: NDArray[np.floating]) -> list[int]:
    """The likeliest labels of successive sentences, where STAY speaks for each that is the same as the one before."""
    best, back = scores[0], []
    for row in scores[1:]:
        moved = int(best.argmax())
        stays = best + STAY >= best[moved]
        back.append(np.where(stays, np.arange(len(best)), moved))
        best = row + np.where(stays, best + STAY, best[moved])
    path = [int(best.argmax())]
    for pointers in reversed(back):
        path.append(int(pointers[path[-1]]))
    return path[::-1]
