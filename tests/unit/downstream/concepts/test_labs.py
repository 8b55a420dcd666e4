"""Lab values: what is read from them, which test they go to, and how often that is right on MACCROBAT."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from downstream.concepts import labs

ONE = [
    ("2.31", (2.31, "", None, "", "")),
    ("WBC 12.3 H", (12.3, "", None, "", "high")),
    ("INR 2.0 (L)", (2.0, "", None, "", "low")),
    ("120/80 mmHg", (120.0, "", 80.0, "mmHg", "")),
    ("<0.01 ng/mL", (0.01, "<", None, "ng/mL", "")),
    ("≤ 20 cm H2O", (20.0, "<=", None, "cm H2O", "")),
    (">= 3", (3.0, ">=", None, "", "")),
    ("less than 3 %", (3.0, "<", None, "%", "")),
    ("98.6 F", (98.6, "", None, "F", "")),
    ("4+", (4.0, "", None, "+", "")),
    ("2-3", (2.0, "", 3.0, "", "")),
    ("20%–25%", (20.0, "", None, "%", "")),
    ("8,800/µL", (8800.0, "", None, "/µL", "")),
    ("74,2 mm", (74.2, "", None, "mm", "")),
    ("15.8 × 109/L", (15.8, "", None, "× 109/L", "")),
    ("-5.1 mmol/L", (-5.1, "", None, "mmol/L", "")),
    ("mildly elevated", (None, "", None, "", "high")),
    ("decreased", (None, "", None, "", "low")),
    ("within normal limits", (None, "", None, "", "normal")),
    ("not elevated", (None, "", None, "", "normal")),
    ("abnormal", (None, "", None, "", "abnormal")),
    ("positive", (None, "", None, "", "positive")),
    ("undetectable", (None, "", None, "", "negative")),
]


@pytest.mark.parametrize(("text", "expected"), ONE)
def test_one_value(text: str, expected: tuple[object, ...]) -> None:
    assert tuple(labs.find(text)[0])[2:] == expected


@pytest.mark.parametrize(
    "text", ["28-year-old", "6-week", "3 days", "V2-V4", "8/13/2010", "HHV8", "the 3rd", "highly", ""]
)
def test_no_value(text: str) -> None:
    assert labs.find(text) == []


def test_values_of_a_line() -> None:
    text = "Hb 9.1 g/dL, WBC 2.3×109/L L, CRP <5 mg/L and serology negative."
    assert [text[v.start : v.end] for v in labs.find(text)] == ["9.1 g/dL", "2.3×109/L L", "<5 mg/L", "negative"]


def spans(text: str, *words: str) -> list[tuple[int, int]]:
    found, here = [], 0
    for word in words:
        here = text.index(word, here)
        found.append((here, here + len(word)))
        here += len(word)
    return found


@pytest.mark.parametrize(
    ("text", "values", "tests", "expected"),
    [
        ("He had elevated troponin and a normal ECG.", ["elevated", "normal"], ["troponin", "ECG"], [0, 1]),
        ("hemoglobin 9.1 g/dL, platelets 7000/μL", ["9.1 g/dL", "7000/μL"], ["hemoglobin", "platelets"], [0, 1]),
        ("hematocrit (34%), albumin (2.1 g/dL)", ["34%", "2.1 g/dL"], ["hematocrit", "albumin"], [0, 1]),
        ("Serum calcium and PTH were 9.6 and 47, respectively.", ["9.6", "47"], ["calcium", "PTH"], [0, 1]),
        ("The ECG was done.\nHis pulse was 60 beats/min.", ["60 beats/min"], ["ECG", "pulse"], [1]),
        ("The ECG was done.\nIt was normal.", ["normal"], ["ECG"], [0]),
    ],
)
def test_links(text: str, values: list[str], tests: list[str], expected: list[int]) -> None:
    assert labs.link(text, spans(text, *values), spans(text, *tests)) == expected


def test_links_keep_the_order_that_is_given_and_need_a_test() -> None:
    text = "hemoglobin 9.1 g/dL, platelets 7000/μL"
    values, tests = spans(text, "9.1 g/dL", "7000/μL"), spans(text, "hemoglobin", "platelets")
    assert labs.link(text, values[::-1], tests[::-1]) == [0, 1]
    assert labs.link(text, values, []) == [None, None]
    assert labs.link(text, [], tests) == []
    with pytest.raises(ValueError, match="weights"):
        labs.link(text, values, tests, [1.0])


def test_few_tests_are_looked_at_for_each_value() -> None:
    text = "Hb 1.2, " * 2_000
    values, tests = [(at + 3, at + 6) for at in range(0, len(text), 8)], [(at, at + 2) for at in range(0, len(text), 8)]
    assert max(len(rows) for rows in labs.features(text, values, tests)) <= 16
    assert labs.link(text, values, tests) == list(range(2_000))


@pytest.mark.parametrize("piece", ["1,", "1-", "< ", "12 x 10", "very ", "within the ", "9"])
def test_long_repetitions_are_read_to_their_end(piece: str) -> None:
    assert labs.find(piece * (200_000 // len(piece)) + " ; negative")[-1].flag == "negative"


def gold() -> list[tuple[str, list[labs.Span], list[labs.Span], list[set[int]]]]:
    """Of each note its text, the values that have a test, all tests, and which of them each value may go to."""
    if (
        not (data := os.environ.get("CHARTLM_DATA"))
        or not (path := Path(data, "concepts/maccrobat2020.jsonl")).exists()
    ):
        pytest.skip("CHARTLM_DATA with MACCROBAT is needed")
    notes = []
    for line in path.read_text(encoding="utf-8").splitlines():
        note = json.loads(line)
        place = {span["id"]: (span["start"], span["end"]) for span in note["spans"]}
        tests = sorted(place[span["id"]] for span in note["spans"] if span["label"] == "Diagnostic_procedure")
        wanted: dict[labs.Span, set[int]] = defaultdict(set)
        for relation in note["relations"]:
            if relation["type"] == "value_of" and place[relation["tail"]] in tests:
                wanted[place[relation["head"]]].add(tests.index(place[relation["tail"]]))
        notes.append((note["text"], list(wanted), tests, list(wanted.values())))
    return notes


def nearest(values: list[labs.Span], tests: list[labs.Span], preceding: bool) -> list[int | None]:
    chosen: list[int | None] = []
    for start, end in values:
        near = [
            (max(a - end, start - b, 0), place) for place, (a, b) in enumerate(tests) if a <= start or not preceding
        ]
        chosen.append(min(near)[1] if near else None)
    return chosen


def test_maccrobat_cross_validated() -> None:
    notes = gold()
    right: dict[str, int] = defaultdict(int)
    rows = [labs.features(text, values, tests) for text, values, tests, _ in notes]
    for learned, held in GroupKFold(5).split(notes, groups=range(len(notes))):
        pairs = []
        for at in learned:
            for candidates, wanted in zip(rows[at], notes[at][3], strict=True):
                good = [np.array(row) for place, row in candidates if place in wanted]
                bad = [np.array(row) for place, row in candidates if place not in wanted]
                pairs += [a - b for a in good for b in bad]
        x = np.concatenate([pairs, -np.array(pairs)])
        y = np.repeat([1, 0], len(pairs))
        weights = LogisticRegression(C=0.1, fit_intercept=False, max_iter=2000).fit(x, y).coef_[0].tolist()
        for at in held:
            text, values, tests, wanted = notes[at]
            for name, linked in (
                ("cross-validated", labs.link(text, values, tests, weights)),
                ("shipped", labs.link(text, values, tests)),
                ("nearest", nearest(values, tests, False)),
                ("preceding", nearest(values, tests, True)),
            ):
                right[name] += sum(one in may for one, may in zip(linked, wanted, strict=True))
                right[name + ", one test"] += sum(
                    one in may for one, may in zip(linked, wanted, strict=True) if len(may) == 1
                )
            right["all"] += len(values)
            right["all, one test"] += sum(len(may) == 1 for may in wanted)
    print(dict(right))
    assert right["all"] == 1373
    assert right["cross-validated"] / right["all"] >= 0.94
    assert right["nearest"] < right["cross-validated"] <= right["shipped"] + 5
