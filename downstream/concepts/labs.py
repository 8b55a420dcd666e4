"""Lab values by grammar, and the test that each belongs to.

    Hb 9.1 g/dL, elevated troponin (<0.01 ng/mL), calcium and PTH were 9.6 and 47, respectively

A value is linked by a small ranker over what stands between it and each test nearby: its weights were learned on
MACCROBAT 2020 (1,373 values; 95 % right in five-fold cross-validation over its documents; the nearest test is right
for 79 %). Every repetition is bounded and few tests are looked at per value, so time is linear in text and values.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

Span = tuple[int, int]


class LabValue(NamedTuple):
    """A value in a text: its characters (end exclusive), its number with what bounds it, its unit and its flag."""

    start: int
    end: int
    number: float | None
    comparison: str = ""
    high: float | None = None  # of "2-3", and the second of "120/80"
    unit: str = ""
    flag: str = ""


_FLAGS = {
    "normal": r"(?:with)?in (?:the |their )?(?:\w{1,10} )?(?:normal|reference) (?:limits?|ranges?|intervals?|values?)"
    r"|(?:not|no longer) (?:elevated|increased|raised|decreased|reduced)|normal(?:i[sz]ed)?|unremarkable|wnl|intact",
    "abnormal": r"abnormal(?:ly)?|not normal|out of range",
    "high": r"(?:very )?high(?:er)?|elevat(?:ed|ion)|increas(?:ed?|ing)|raised|rising",
    "low": r"(?:very )?low(?:er)?|decreas(?:ed?|ing)|reduced|reduction|depressed",
    "negative": r"negative|non-?reactive|undetect(?:able|ed)|not detect(?:ed|able)|absent",
    "positive": r"positiv(?:e|ity)|reactive|detect(?:ed|able)",
}
_FIGURE = r"(?:\d{1,3}(?:,\d{3}){1,3}(?:\.\d{1,4})?|\d{1,9}(?:[.,]\d{1,4})?)"
_UNIT = (
    r"mm\s?hg|cm\s?h2o|mmh2o|k?pa|°\s?[cf]|º\s?[cf]|[cf](?![\w.])|beats?(?:/min(?:ute)?| per min(?:ute)?)|bpm"
    r"|breaths?(?:/min(?:ute)?| per minute)|/\s?min(?:ute)?|per min(?:ute)?|%|msec|ms|mm/hr?|/hpf|/[µμu]l|/mm3|/[dm]?l"
    r"|(?:m|µ|μ|u|n|p|f|k)?(?:mol|eq|iu|ui|u|g|gm|l|m|cells)(?:\s?/\s?(?:kg|min|(?:d|m|µ|μ|u)?l|mol|h|day|mm3|m2)){0,3}"
    r"|mc?g(?:/(?:d|m)?l)?|cm|mm|cc|db|k/ul|lbs?|\+"
)
_TIME = r"(?:years?|yrs?|y/?o|months?|weeks?|days?|hours?|hrs?|st|nd|rd|th|times)\b"
_NUMERIC = re.compile(
    r"(?<![\w.,/])(?P<comparison>[<>]=?|[≤≥]|less than|greater than|more than|over|under|above|below)?\s?"
    rf"(?P<sign>(?<![\w\s]\s)[-−–])?(?P<number>{_FIGURE})(?:\s?(?:-|–|/|to)\s?(?P<high>{_FIGURE}))?(?!\d|[.,/]\d|[a-z]{{5}})"
    rf"(?!\s?-?\s?{_TIME})(?P<unit>\s?[x×]\s?10\s?\^?\d{{1,2}}(?:\s?/\s?[mµμud]?l|/mm3|\s?cells/[µμ]l)?|\s?(?:{_UNIT})(?![\w]))?"
    r"(?![\w]|-[a-z])(?:\s(?P<flag>\(?(?:H|L|high|low)\)?)(?![\w-]))?",
    re.I,
)
_COMPARISONS = {"≤": "<=", "≥": ">=", "less than": "<", "below": "<", "under": "<"}
_WORDED = re.compile(
    r"(?<![\w-])(?:(?:mild|slight|marked|moderate|severe|considerab|gradual)ly )?(?:"
    + "|".join(f"(?P<{flag}>{words})" for flag, words in _FLAGS.items())
    + r")(?![\w-])",
    re.I,
)

_SIDE = 8  # tests looked at on each side of a value
_SENTENCE_END = re.compile(r"\n|[.?!]\s+(?=[A-Z])")
_RESPECTIVELY = re.compile(r"\brespectively\b", re.I)
_KINDS = {  # what a unit measures, and the tests that are such
    r"mm\s?hg|cm\s?h2o|kpa": r"press|\bbp\b|p[ao2co]{2,3}|pap|gradient|systol|diastol|wedge|co2|o2",
    r"°|º|celsius|fahrenheit|\d\s?[CF]\b": r"temp|fever",
    r"beats|bpm|/\s?min(?!/)|per min|breaths": r"rate|pulse|rhythm|\bhr\b|\brr\b|cardi|resp|beat",
    r"\d\s?%": r"satur|fraction|\bl?v?ef\b|spo2|sao2|hematocrit|\bhct\b|hba1c|neutro|lympho|%|index|ratio|ki-?67"
    r"|oxygen|fev|fvc|dlco",
    r"[x×]\s?10|/\s?(?:mm3|[µμu]l)|cells": r"count|wbc|rbc|platelet|cell|cyte|phil|\bplt",
    r"\bmm\b|\bcm\b|\bm\b": r"diam|thick|size|dimension|height|length|width|measur|lv|la\b",
    r"\bk?g\b(?!/)|\blbs?\b": r"weight|\bbw\b",
    r"\bms(?:ec)?\b": r"qt|pr\b|interval|qrs|duration|time",
    r"/h|mm/hr": r"sediment|\besr\b",
    r"g/d?l|mol/l|u/l|u/ml|eq/l|g/ml": r"in\b|ase\b|\b[a-z]{2,5}\b|level|serum|sodium|potassium|calcium|glucose"
    r"|acid|prot|anti",
}
_UNIT_OF = [(re.compile(unit, re.I), re.compile(tests, re.I)) for unit, tests in _KINDS.items()]
_BROAD = re.compile(
    r"laborator|examination|tests?\b|studies|study|findings|investigation|imaging|scan|analysis|stain|biops|evaluation"
    r"|assess",
    re.I,
)
_MODALITY = re.compile(
    r"\b(?:ct|mri|us|ecg|ekg|eeg|echo\w*|radiogra\w+|x-?ray|ultraso\w+|\w+scopy|\w+graphy|\w+gram|pet)\b", re.I
)
_GAPS = {
    "blank": r"[\s-]*",
    "open": r"\s*\(\s*",
    "is": r"[^,;()]{0,25}\b(?:was|were|is|are|of|at|to|remained|became)\s[^,;()]{0,15}",
    "colon": r"\s*(?:level|count)?s?\s*[,:=]\s*",
    "showed": r".{0,40}\b(?:showed|revealed|demonstrated|disclosed|found|identified|confirmed)\b.{0,30}",
    "for": r"\s*(?:\w+\s){0,2}(?:for|in|of|in the|of the)\s(?:\w+\s){0,2}",
    "adjective": r"\s\w+\s|\s\w+\s\w+\s",
}
_GAP = {name: re.compile(pattern, re.I | re.S) for name, pattern in _GAPS.items()}
_INSIDE = {"comma": ",", "semicolon": ";", "and": " and ", "close": ")", "opened": "(", "but": " but "}
_INSIDE |= {"while": " whil", "with": " with "}
_NAMES = "distance words before nearest first_side skipped crossed sentence kind wrong_kind broad modality".split()
_NAMES += "aligned misaligned claimed".split()
_BASE = [*_NAMES, *(f"{gap}_{side}" for gap in (*_GAPS, *_INSIDE) for side in ("before", "after"))]
FEATURES = [*_BASE, *(f"number_{name}" for name in _BASE)]


def find(text: str) -> list[LabValue]:
    """All values of a text in their order: figures with what bounds them and their unit, and words such as "elevated".
    Ages, durations and ordinals are none. Raises nothing.
    """
    found = []
    for match in _NUMERIC.finditer(text):
        said = (match["comparison"] or "").lower()
        start = match.start("comparison") if said else match.start("sign") if match["sign"] else match.start("number")
        figure = -_figure(match["number"]) if match["sign"] else _figure(match["number"])
        high = _figure(match["high"]) if match["high"] else None
        flag = {"h": "high", "l": "low"}.get((match["flag"] or "").strip("()").lower()[:1], "")
        comparison = said if said[:1] in ("<", ">") else _COMPARISONS.get(said, ">" if said else "")
        found.append(LabValue(start, match.end(), figure, comparison, high, (match["unit"] or "").strip(), flag))
    for match in _WORDED.finditer(text):
        found.append(LabValue(*match.span(), None, flag=match.lastgroup or ""))
    found.sort()
    # "12.3 high" is one value
    return [value for place, value in enumerate(found) if not place or value.start >= found[place - 1].end]


def _figure(said: str) -> float:
    """Of 8,800 the thousands, of 74,2 the decimals."""
    thousands = re.fullmatch(r"\d{1,3}(?:,\d{3}){1,3}(?:\.\d+)?", said)
    return float(said.replace(",", "" if thousands else "."))


def _sentences(text: str) -> list[int]:
    return [0, *(match.end() for match in _SENTENCE_END.finditer(text))]


def features(text: str, values: Sequence[Span], tests: Sequence[Span]) -> list[list[tuple[int, list[float]]]]:
    """For every value its candidate tests (places in `tests`), each with what the ranker weighs, as in FEATURES."""
    order = sorted(range(len(tests)), key=lambda place: tests[place])
    sorted_tests = [tests[place] for place in order]
    starts = [start for start, _ in sorted_tests]
    sorted_values = sorted(set(values))
    value_starts = [start for start, _ in sorted_values]
    sentences = _sentences(text)
    aligned = _aligned(text, sorted_values, sorted_tests, sentences)
    found = []
    for value in values:
        here = bisect.bisect_right(starts, value[0])
        near = range(max(0, here - _SIDE), min(len(order), here + _SIDE))
        gaps = [_distance(value, sorted_tests[place]) for place in near]
        rows = []
        for place, gap in zip(near, gaps, strict=True):
            test = sorted_tests[place]
            row = _row(text, value, test, gap)
            before = test[0] <= value[0]
            row["nearest"] = float(gap == min(gaps))
            skipped = here - 1 - place if before else place - here
            row["first_side"], row["skipped"] = float(skipped == 0), float(min(skipped, 5))
            left, right = (test[1], value[0]) if before else (value[1], test[0])
            crossed = bisect.bisect_left(value_starts, right) - bisect.bisect_left(value_starts, left)
            row["crossed"] = float(min(max(0, crossed), 4))
            row["sentence"] = float(bisect.bisect_right(sentences, value[0]) == bisect.bisect_right(sentences, test[0]))
            target = aligned.get(value)
            row["aligned"], row["misaligned"] = float(target == test), float(target not in (None, test))
            row["claimed"] = _claimed(text, value, test, sorted_values, value_starts)
            base = [row.get(name, 0.0) for name in _BASE]
            numeric = any(sign.isdigit() for sign in text[value[0] : value[1]])
            rows.append((order[place], base + [cell if numeric else 0.0 for cell in base]))
        found.append(rows)
    return found


def _distance(value: Span, test: Span) -> int:
    return max(test[0] - value[1], value[0] - test[1], 0)


def _row(text: str, value: Span, test: Span, gap: int) -> dict[str, float]:
    before = test[0] <= value[0]
    side = "before" if before else "after"
    left, right = (test[1], value[0]) if before else (value[1], test[0])
    between = text[left:right] if right - left <= 400 else text[left : left + 200] + text[right - 200 : right]
    said, name = text[value[0] : value[1]], text[test[0] : test[1]]
    row = {"distance": math.log1p(gap), "words": min(between.count(" "), 30) / 10, "before": float(before)}
    for kind, pattern in _GAP.items():
        row[f"{kind}_{side}"] = float(len(between) <= 100 and pattern.fullmatch(between) is not None)
    for kind, sign in _INSIDE.items():
        row[f"{kind}_{side}"] = float(min(between.count(sign), 3))
    kinds = [tests for unit, tests in _UNIT_OF if unit.search(said)]
    fits = any(tests.search(name) for tests in kinds)
    row["kind"], row["wrong_kind"] = float(fits), float(bool(kinds) and not fits)
    row["broad"], row["modality"] = float(_BROAD.search(name) is not None), float(_MODALITY.search(name) is not None)
    return row


def _claimed(text: str, value: Span, test: Span, values: Sequence[Span], starts: Sequence[int]) -> float:
    """Whether another value stands nearer to the test than this one does."""
    here = bisect.bisect_left(starts, test[0])
    gap = _distance(value, test)
    return float(any(_distance(other, test) < gap for other in values[max(0, here - 1) : here + 2] if other != value))


def _aligned(text: str, values: Sequence[Span], tests: Sequence[Span], sentences: Sequence[int]) -> dict[Span, Span]:
    """Of "A and B were 1 and 2, respectively": 1 to A, 2 to B."""
    found: dict[Span, Span] = {}
    for match in _RESPECTIVELY.finditer(text):
        first = sentences[bisect.bisect_right(sentences, match.start()) - 1]
        here, until, listed = bisect.bisect_left(values, (match.start(), 0)), match.start(), list[Span]()
        for value in reversed(values[max(0, here - 12) : here]):
            after = bisect.bisect_left(tests, (value[1], 0))
            broken = until - value[1] > 40 or (after < len(tests) and tests[after][0] < until)
            if value[0] < first or (broken and listed):
                break
            if not broken:
                listed.insert(0, value)
                until = value[0]
        here = bisect.bisect_left(tests, (listed[0][0], 0)) if len(listed) > 1 else 0
        heads = [test for test in tests[max(0, here - len(listed)) : here] if test[0] >= first]
        if listed and len(heads) == len(listed):
            found.update(zip(listed, heads, strict=True))
    return found


WEIGHTS: tuple[float, ...] = (  # in the order of FEATURES, learned on all documents
    -0.97, -0.01, 0.30, -0.37, 0.23, 0.33, -0.74, 3.28, 0.18, -0.18, -0.09, -0.44, 0.50, -0.50,
    -0.22, 0.34, 1.38, 0.25, -0.26, 0.84, 0.34, -0.09, -0.52, -0.76, -0.33, 0.16, 1.07, -0.17,
    0.65, -0.43, -0.13, -0.22, -0.75, -0.10, -0.36, -1.21, -0.21, 1.41, -0.92, -0.24, -0.30, -0.22,
    -0.29, 0.46, -0.72, -0.54, -0.51, 1.34, -0.42, -0.37, -0.45, 0.11, 0.31, 0.18, -0.18, -0.24,
    -0.35, 0.50, -0.50, -0.07, 0.63, 0.27, 0.13, 0.00, 0.12, 0.00, 0.23, -0.42, -0.06, -0.01,
    0.20, 0.02, -0.07, -0.07, -0.12, -1.00, -0.04, -0.53, 0.35, -0.45, -0.30, -0.32, 0.96, -0.24,
    0.03, 0.00, 0.00, 0.00, 0.04, -0.04,
)  # fmt: skip


def link(
    text: str, values: Sequence[Span], tests: Sequence[Span], weights: Sequence[float] = WEIGHTS
) -> list[int | None]:
    """For each value the place in `tests` of the test it belongs to; None where there is no test at all. `weights` are
    one for each of FEATURES: a ValueError where they are not.
    """
    if len(weights) != len(FEATURES):
        raise ValueError(f"weights: {len(weights)} given, {len(FEATURES)} features")
    linked: list[int | None] = []
    for rows in features(text, values, tests):
        scored = [(sum(w * x for w, x in zip(weights, row, strict=True)), -place) for place, row in rows]
        linked.append(-max(scored)[1] if scored else None)
    return linked
