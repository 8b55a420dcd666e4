"""Where a note's sections begin and what they are: from its headings, and where it has none, from the words.

    PMHx: asthma.  ALLERGIES:,  None.,…   past_medical_history │ allergies │ …      heading
    He quit smoking.  Mother had MS.      social_history       │ family_history     learned (SectionTagger)

A heading is looked up in headings.toml; one that is not there is told by its head words, and one that is still unknown
is a section "other", so that it ends the section before it. "LUNGS:" belongs to the section in which it stands.
"""

from __future__ import annotations

import io
import json
import re
import tomllib
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.svm import LinearSVC

Passages = Sequence[str] | NDArray[np.object_]

OTHER = "other"
DEFAULT = "physical_exam"  # of a part of the body, where the section it stands in is not known
LONGEST = 80  # characters of a heading
UNHEADED = 200  # a stretch without heading that is longer is read by the tagger
STAY = 1.0  # log-odds for the next sentence to be in the same section

# The sections that go by parts of the body; in any other one "LUNGS:" begins an examination.
BY_BODY = frozenset(
    "physical_exam review_of_systems findings imaging diagnostics laboratory assessment plan hospital_course".split()
)
BY_PROBLEM = frozenset(("hospital_course", "assessment", "plan"))
SCORES = {"exact": 1.0, "heads": 0.9, "weak": 0.8, "body": 0.7, "unknown": 0.5}


class SectionSpan(NamedTuple):
    """A section: code points [start, end) of the text, its heading's span without the colon, and how it was told."""

    start: int
    end: int
    label: str
    heading: tuple[int, int] | None
    source: str
    score: float


class _Table(NamedTuple):
    words: dict[str, str]
    exact: dict[str, str]
    heads: dict[str, str]
    weak: dict[str, str]
    body: frozenset[str]
    parts: frozenset[str]
    labels: tuple[str, ...]


_WORD = re.compile(r"[a-z0-9]+")
_ARTICLES = frozenset("the a an this that his her their your our its patients s".split())
_LEVEL = re.compile(r"[clts]\d{1,2}(?: [clts]?\d{1,2})?")  # "L5-S1"
_TAIL = frozenset("on at for during prior upon by in to with from per given performed done after before".split())
_SENTENCE = frozenset("is are was were has have had no not none denies does did he she they which".split())


def _folded(heading: str, words: Mapping[str, str]) -> str:
    heading = re.sub(
        r"\([^)]*\)?", " ", heading.lower().replace("&", " and ").replace("/", " and ").replace("+", " and ")
    )
    heading = re.sub(r"(?<=\b[a-z])\.(?=[a-z]\b)", "", heading).replace("'", "")
    found = []
    for word in _WORD.findall(heading):
        if word in words:
            found.append(words[word])
        elif word not in _ARTICLES or word == heading.strip():
            found.append(words.get(_singular(word), _singular(word)))
    while len(found) > 1 and found[-1].isdigit():  # "PROCEDURE #2"
        found.pop()
    return " ".join(found)


def _singular(word: str) -> str:
    if len(word) <= 3 or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("noses", "pses", "theses")):
        return word[:-2] + "is"
    return word[:-1] if word.endswith("s") else word


@cache
def _read() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("headings.toml").read_text(encoding="utf-8"))


@cache
def _table() -> _Table:
    read = _read()
    words: dict[str, str] = read["abbreviations"]
    phrases: dict[str, dict[str, str]] = {"exact": {}, "heads": {}, "weak": {}}
    for label, kinds in read["labels"].items():
        for kind, written in kinds.items():
            for phrase in written:
                phrases[kind].setdefault(_folded(phrase, words), label)
    body = frozenset(_folded(phrase, words) for phrase in read["body"]["exact"])
    parts = frozenset(_folded(phrase, words) for phrase in read["body"]["heads"])
    labels = (*read["labels"], OTHER)
    return _Table(words, phrases["exact"], phrases["heads"], phrases["weak"], body, parts, labels)


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    return {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _read()["clues"].items()}


def labels() -> tuple[str, ...]:
    """The labels that `find` gives, "other" last."""
    return _table().labels


def label_of(heading: str, within: str = OTHER) -> tuple[str, str]:
    """The label of a heading that stands in a section `within`, and how it was told: exact, heads, weak, body, unknown.

    Never fails: an unknown heading is ("other", "unknown").
    """
    label, how = _looked_up(heading)
    if heading == "P" and within == "assessment":  # the last of S, O, A, P; else a pulse
        return "plan", how
    return (within if within in BY_BODY else DEFAULT, how) if how == "body" else (label, how)


def _looked_up(heading: str) -> tuple[str, str]:
    table = _table()
    whole = _folded(heading, table.words)
    if not whole:
        return OTHER, "unknown"
    if whole in table.exact and whole not in table.body:
        return table.exact[whole], "exact"
    if whole in table.body or _LEVEL.fullmatch(whole):
        return DEFAULT, "body"
    pieces = [piece.split() for piece in re.split(r"[,;/&:]| - |--|\b(?:and|or)\b", heading.lower())]
    said = [whole.split(), *([*_folded(" ".join(piece), table.words).split()] for piece in pieces)]
    for kind, phrases in (("heads", table.heads), ("weak", table.weak)):
        for words in [*said[1:], said[0]]:  # "MEDICATIONS AND ALLERGIES" is of the first
            cut = next((place for place, word in enumerate(words) if place and word in _TAIL), len(words))
            for part in (words[:cut], words[cut:]):
                if kind == "heads" and " ".join(part) in table.exact and " ".join(part) not in table.body:
                    return table.exact[" ".join(part)], "heads"
                if (found := _last(part, phrases)) is not None:
                    return phrases[found], kind
    if any(_last(words, table.parts) is not None or " ".join(words) in table.body for words in said):
        return DEFAULT, "body"
    return OTHER, "unknown"


def _last(words: Sequence[str], phrases: Mapping[str, str] | frozenset[str]) -> str | None:
    """Of the phrases in the words the one that ends last, and of those the longest."""
    for end in range(len(words), 0, -1):
        for start in range(max(0, end - 5), end):
            if (phrase := " ".join(words[start:end])) in phrases:
                return phrase
    return None


_HARD = re.compile(r"[.;!?\])]+[\s,]+|,(?=\S)|\n|\s{2,}|[•*#>]\s*")  # after these a heading may begin
_BARE = re.compile(r"(?:^|(?<=[\n,]))[ \t]*([A-Z][A-Za-z/&' -]{2,60}?)[ \t]*(?=\n|,\S|$)")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?:\s+|,(?=\S))|\n+")
_ITEM = re.compile(r"(?:#|\d[.)])[ \t,]*$")
_BEFORE = frozenset('.,;:!?)]•*#>"\n\t')


def _candidates(text: str) -> Iterator[tuple[int, int]]:
    """Spans that read like headings, in order of their ends; never looks further back than LONGEST characters."""
    done = 0
    for colon in re.finditer(":", text):
        end = colon.start()
        after = text[end + 1 : end + 2]
        back = max(done, end - LONGEST)
        window = text[back:end].rstrip()
        done = end + 1
        if not window or after == "/" or (after.isdigit() and window[-1].isdigit()):  # a link, the time of day
            continue
        stop = back + len(window)
        line = window.rfind("\n") + 1
        at_line = line > 0 or back == 0 or text[back - 1] == "\n"
        start = _shouted(text, back, stop)
        if start is None:
            start = _titled(text, back + line if at_line else back, stop, at_line)
        if start is not None and start < stop:
            yield start, stop


def _shouted(text: str, back: int, stop: int) -> int | None:
    """Where an upper-case heading that ends at `stop` begins."""
    window = text[back:stop]
    run = next((place + 1 for place in range(len(window) - 1, -1, -1) if window[place].islower()), 0)
    for cut in _HARD.finditer(window, run):
        run = cut.end() if cut.end() < len(window) else run
    while run < len(window) and not "A" <= window[run] <= "Z":
        run += 1
    words, inside = window[run:], back + run
    if not words:
        return None
    last = words.rfind(", ") + 2
    last += 4 if words.startswith("AND ", last) else 0
    begins = _begins(text, inside)
    content = text[max(0, back - 1) : inside].strip() == ":" and label_of(words)[1] == "heads"  # "PMH: HTN FAMILY HX:"
    if content or not begins:  # line breaks that became spaces: only what is certainly a heading
        for space in re.finditer(" ", words):
            if " " in words[space.end() :].strip() and label_of(words[space.end() :])[1] == "exact":
                return inside + space.end()
        if not begins and " " in words and label_of(words)[1] == "exact" and text[inside - 1] == " ":
            return inside
        if not begins:
            return inside + last if ", " in words else None
    if ", " in words:  # "REVIEW OF SYSTEMS, GENITOURINARY" but "MRI, HEENT"
        sentence = len(words) > 60 or _SENTENCE & set(words.lower().split())
        if sentence or label_of(words[: words.index(", ")])[1] not in ("exact", "body"):
            return inside + last
    return None if len(words.split()) > 10 else inside


def _begins(text: str, start: int) -> bool:
    before = text[max(0, start - 4) : start].rstrip(" ")
    if not before or before[-1] in _BEFORE or text[max(0, start - 2) : start] == "  ":
        return True
    return before[-1] == "-" and (len(before) == 1 or before[-2] in "\n ")  # a bullet, not "2-D ECHO"


def _titled(text: str, start: int, stop: int, at_line: bool) -> int | None:
    """Where "Past Medical History" begins that ends at `stop`: at a line's beginning or after a sentence."""
    window = text[start:stop]
    cuts = [found.end() for found in re.finditer(r"[.;!?,]+[\s,]+|,(?=\S)|\s{2,}|^[\s•*#>-]*(?:\d+[.)]\s*)?", window)]
    for cut in cuts if at_line else cuts[::-1]:
        words = window[cut:]
        if (cut == 0 and not at_line) or not words or not words[0].isalpha() or len(words.split()) > 6:
            continue
        how = label_of(words)[1]
        titled = words[0].isupper()
        line = at_line and cut == cuts[0]
        if (titled and (how == "exact" or (line and how in ("heads", "body")))) or (line and how == "exact"):
            return start + cut
    return None


def _bare(text: str) -> Iterator[tuple[int, int]]:
    """Known headings that stand alone on a line, without a colon."""
    for found in _BARE.finditer(text):
        words = found[1]
        lost = text[found.end() : found.end() + 1] == "," or text[found.start() - 1 : found.start()] == ","
        if (
            len(words) > 3
            and (words.isupper() or (not lost and all(word[0].isupper() for word in words.split() if len(word) > 3)))
            and label_of(words)[1] == "exact"
        ):
            yield found.span(1)


def find(text: str) -> list[SectionSpan]:
    """The sections of a note by its headings, ascending and contiguous from the first heading to the end of the text.

    Empty where no heading is found. Takes time linear in the text.
    """
    found: list[tuple[int, int]] = []
    for start, end in sorted({*_candidates(text), *_bare(text)}):
        if not found or start >= found[-1][1]:
            found.append((start, end))
    stops = [*(start for start, _ in found[1:]), len(text)]
    spans: list[SectionSpan] = []
    within = OTHER
    for (start, end), stop in zip(found, stops, strict=False):
        label, how = label_of(text[start:end], within)
        if how == "unknown" and within in BY_PROBLEM and _ITEM.search(text[max(0, start - 6) : start]):
            spans[-1] = spans[-1]._replace(end=stop)  # "# CHF: diuresed"
            continue
        within = label if how != "unknown" else within
        spans.append(SectionSpan(start, stop, label, (start, end), "heading", SCORES[how]))
    return spans


class SectionTagger:
    """Which section a passage without heading is of: a linear SVM over its words, characters and clues."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._seen: dict[str, TfidfVectorizer] = {}
        self._weights: NDArray[np.floating] = np.empty((0, 0))  # one row a label; the last column is the intercept
        self._sharpness = 1.0

    def fit(
        self, texts: Sequence[str], labels: Sequence[str], groups: Sequence[Any] | None = None, seed: int = 0
    ) -> SectionTagger:
        """Itself, fitted. Its probabilities are calibrated by cross-validation, the passages of a group together.

        Raises ValueError for fewer than two labels or lengths that differ.
        """
        if len(texts) != len(labels) or (groups is not None and len(groups) != len(texts)):
            raise ValueError(f"{len(texts)} texts but {len(labels)} labels, or groups of another length")
        if len(set(labels)) < 2:
            raise ValueError("a tagger needs passages of two labels or more")
        self.names = tuple(sorted(set(labels)))
        truth = np.array([self.names.index(label) for label in labels])
        passages = np.array(texts, dtype=object)
        outputs = np.full((len(texts), len(self.names)), -1.0)
        parts = (StratifiedKFold if groups is None else StratifiedGroupKFold)(3, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a label with fewer passages than folds
            folds = list(parts.split(passages, truth, groups)) if len(texts) >= 30 else []
        for learn, held in folds:
            if len(set(truth[learn])) > 2:
                known = self._learn(passages[learn], truth[learn], seed)
                outputs[np.ix_(held, known)] = self._outputs(passages[held])
        tried = np.geomspace(0.5, 16, 26)
        losses = [-np.log(_softmax(outputs * sharp)[np.arange(len(truth)), truth]).mean() for sharp in tried]
        self._sharpness = float(tried[int(np.argmin(losses))]) if folds else 3.0
        self._learn(passages, truth, seed)
        return self

    def _learn(self, texts: Passages, truth: NDArray[np.integer], seed: int) -> NDArray[np.integer]:
        self._seen = _vectorizers()
        for name, seen in self._seen.items():
            seen.fit(_clues(texts) if name == "clues" else texts)
        known, counts = np.unique(truth, return_counts=True)
        rare = dict(zip(known.tolist(), np.sqrt(counts.mean() / counts).tolist(), strict=True))  # halfway to balanced
        svm = LinearSVC(C=1.0, class_weight=rare, max_iter=3000, tol=1e-3, random_state=seed)
        svm.fit(self._features(texts), truth)
        weights = np.column_stack([svm.coef_, svm.intercept_]).astype(np.float32)
        self._weights = weights if len(weights) > 1 else np.vstack([-weights, weights])
        return np.asarray(known)

    def _features(self, texts: Passages) -> sparse.csr_matrix:
        read = [seen.transform(_clues(texts) if name == "clues" else texts) for name, seen in self._seen.items()]
        return sparse.hstack(read).tocsr()

    def _outputs(self, texts: Passages) -> NDArray[np.floating]:
        return np.asarray(self._features(texts) @ self._weights[:, :-1].T + self._weights[:, -1])

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.floating]:
        """For each text a row with the probability of each of `names`. Raises ValueError where it was not fitted."""
        if not self.names:
            raise ValueError("the section tagger was not fitted")
        return _softmax(self._outputs(texts) * self._sharpness) if len(texts) else np.empty((0, len(self.names)))

    def predict(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """For each text its label and that label's probability. Raises ValueError where it was not fitted."""
        return [(self.names[int(row.argmax())], float(row.max())) for row in self.probabilities(texts)]

    def save(self) -> bytes:
        """The tagger as an npz archive without pickles. Raises ValueError where it was not fitted."""
        if not self.names:
            raise ValueError("the section tagger was not fitted")
        words = {name: list(seen.get_feature_names_out()) for name, seen in self._seen.items()}
        said = json.dumps({"names": self.names, "sharpness": self._sharpness, "words": words}).encode()
        out = io.BytesIO()
        idf = {f"idf_{name}": seen.idf_.astype(np.float32) for name, seen in self._seen.items()}
        np.savez_compressed(out, allow_pickle=False, json=np.frombuffer(said, np.uint8), weights=self._weights, **idf)
        return out.getvalue()

    @classmethod
    def load(cls, saved: bytes) -> SectionTagger:
        """The tagger that `save` wrote. Raises ValueError where the bytes are not one."""
        tagger = cls()
        try:
            with np.load(io.BytesIO(saved), allow_pickle=False) as read:
                said = json.loads(read["json"].tobytes())
                tagger.names, tagger._sharpness = tuple(said["names"]), float(said["sharpness"])
                tagger._weights = read["weights"]
                tagger._seen = _vectorizers(said["words"])
                for name, seen in tagger._seen.items():
                    seen.idf_ = read[f"idf_{name}"]
        except (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError("not a saved section tagger") from error
        if tagger._weights.shape != (len(tagger.names), 1 + sum(map(len, said["words"].values()))):
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
    return str(_read()["mts_dialog"].get(label, label.lower() if label.lower() in labels() else label))


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
