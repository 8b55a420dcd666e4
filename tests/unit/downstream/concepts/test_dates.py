"""Date phrases: exact intervals, what must stay unresolved, texts, and how many of MACCROBAT's are understood."""

from __future__ import annotations

import itertools
import json
import os
from datetime import date
from pathlib import Path

import pytest

from downstream.concepts import dates
from downstream.concepts.dates import Anchors

NOTE = date(2015, 8, 2)  # a Sunday
ANCHORS = Anchors(birth=date(1970, 5, 1), admission=date(2015, 7, 28), surgery=date(2015, 7, 30))

ALWAYS = [  # need neither a note date nor an anchor
    ("2015", "2015-01-01", "2015-12-31", "year"),
    ("[**2150-8-13**]", "2150-08-13", "2150-08-13", "day"),
    ("[**8-/2150**]", "2150-08-01", "2150-08-31", "month"),
    ("8/13/2010", "2010-08-13", "2010-08-13", "day"),
    ("13 August 2010", "2010-08-13", "2010-08-13", "day"),
    ("Aug. 13, 2010", "2010-08-13", "2010-08-13", "day"),
    ("August 2010", "2010-08-01", "2010-08-31", "month"),
    ("03-Jan-2011", "2011-01-03", "2011-01-03", "day"),
    ("2011-01-03", "2011-01-03", "2011-01-03", "day"),
    ("in the 1990s", "1990-01-01", "1999-12-31", "decade"),
    ("early 2012", "2012-01-01", "2012-04-30", "year"),
    ("late December, 2011", "2011-12-21", "2011-12-31", "month"),
    ("summer of 2014", "2014-06-01", "2014-08-31", "season"),
    ("between 2011 and 2013", "2011-01-01", "2013-12-31", "year"),
]
FROM_NOTE = [  # counted from the note date
    ("last summer", "2014-06-01", "2014-08-31", "season"),
    ("a few years ago", "2010-08-02", "2013-08-02", "approximate"),
    ("[**8-13**]", "2014-08-13", "2014-08-13", "day"),
    ("8/13", "2014-08-13", "2014-08-13", "day"),
    ("8/1", "2015-08-01", "2015-08-01", "day"),
    ("Aug 13th", "2014-08-13", "2014-08-13", "day"),
    ("8/13/10", "2010-08-13", "2010-08-13", "day"),
    ("February 29", "2012-02-29", "2012-02-29", "day"),
    ("yesterday", "2015-08-01", "2015-08-01", "day"),
    ("today", "2015-08-02", "2015-08-02", "day"),
    ("this morning", "2015-08-02", "2015-08-02", "day"),
    ("3 days ago", "2015-07-30", "2015-07-30", "day"),
    ("two weeks ago", "2015-07-16", "2015-07-22", "week"),
    ("a couple of days ago", "2015-07-30", "2015-07-31", "approximate"),
    ("10 years ago", "2005-02-01", "2006-01-31", "year"),
    ("last week", "2015-07-20", "2015-07-26", "week"),
    ("last month", "2015-07-01", "2015-07-31", "month"),
    ("last year", "2014-01-01", "2014-12-31", "year"),
    ("next month", "2015-09-01", "2015-09-30", "month"),
    ("in the past 3 months", "2015-05-02", "2015-08-02", "approximate"),
    ("in June", "2015-06-01", "2015-06-30", "month"),
    ("in October", "2014-10-01", "2014-10-31", "month"),
    ("on Monday", "2015-07-27", "2015-07-27", "day"),
    ("between April and June", "2015-04-01", "2015-06-30", "month"),
    # no anchor: what a note date alone says
    ("POD#2", "2015-07-31", "2015-08-02", "approximate"),
    ("one month later", "2015-08-18", "2015-09-17", "approximate"),
    ("6 months prior", "2015-01-18", "2015-02-17", "approximate"),
    ("on admission", "2015-08-02", "2015-08-02", "approximate"),
]
ANCHORED = [
    ("at age 12", "1982-05-01", "1983-04-30", "year"),
    ("at the age of twelve", "1982-05-01", "1983-04-30", "year"),
    ("12 years of age", "1982-05-01", "1983-04-30", "year"),
    ("hospital day 3", "2015-07-30", "2015-07-30", "day"),
    ("eleventh hospital day", "2015-08-07", "2015-08-07", "day"),
    ("post-op day 2", "2015-08-01", "2015-08-01", "day"),
    ("POD#2", "2015-08-01", "2015-08-01", "day"),
    ("postoperative day 5", "2015-08-04", "2015-08-04", "day"),
    ("day 3", "2015-07-30", "2015-07-30", "approximate"),
    ("3 days later", "2015-07-31", "2015-07-31", "approximate"),
    ("two weeks after", "2015-08-08", "2015-08-14", "approximate"),
    ("two weeks after surgery", "2015-08-10", "2015-08-16", "week"),
    ("within 2 weeks after surgery", "2015-07-30", "2015-08-13", "approximate"),
    ("within one week", "2015-07-28", "2015-08-04", "approximate"),
    ("the following day", "2015-07-29", "2015-07-29", "approximate"),
    ("next day", "2015-07-29", "2015-07-29", "approximate"),
    ("the same day", "2015-07-28", "2015-07-28", "approximate"),
    ("on admission", "2015-07-28", "2015-07-28", "day"),
    ("at follow-up 6 months later", "2016-01-13", "2016-02-12", "approximate"),
    ("one and a half years later", "2016-07-30", "2017-07-29", "approximate"),
]
NONE = [
    "31 February 2010", "13/13/2010", "2010-02-30", "[**2150-13-1**]", "[**Last 2150**]", "[**Last Name (un) 2150**]",
    "[**Month/Day**]", "normal", "three", "5", "1200", "120/80", "3.8 cm", "eventually", "at age 12", "and", "",
    "1 week and 2 months", " . ",
]  # fmt: skip


def interval(first: str, last: str, granularity: str) -> dates.Resolved:
    return date.fromisoformat(first), date.fromisoformat(last), granularity


@pytest.mark.parametrize(("phrase", "first", "last", "granularity"), ALWAYS)
@pytest.mark.parametrize("note_date", [None, NOTE])
def test_absolute_phrases(phrase: str, first: str, last: str, granularity: str, note_date: date | None) -> None:
    assert dates.resolve(phrase, note_date) == interval(first, last, granularity)


@pytest.mark.parametrize(("phrase", "first", "last", "granularity"), FROM_NOTE)
def test_phrases_from_the_note_date(phrase: str, first: str, last: str, granularity: str) -> None:
    assert dates.resolve(phrase, NOTE) == interval(first, last, granularity)
    assert dates.resolve(phrase, None) is None


@pytest.mark.parametrize(("phrase", "first", "last", "granularity"), ANCHORED)
def test_phrases_from_anchors(phrase: str, first: str, last: str, granularity: str) -> None:
    assert dates.resolve(phrase, NOTE, ANCHORS) == interval(first, last, granularity)
    assert dates.resolve(phrase, None, ANCHORS) == interval(first, last, granularity)
    assert dates.resolve(phrase, None) is None


@pytest.mark.parametrize("phrase", NONE)
def test_what_is_no_date(phrase: str) -> None:
    assert dates.resolve(phrase, NOTE) is None


@pytest.mark.parametrize("phrase", [row[0] for row in ALWAYS + FROM_NOTE + ANCHORED])
def test_early_and_late_note_dates_raise_nothing(phrase: str) -> None:
    for note_date in (date.min, date.max, date(2016, 2, 29)):
        dates.resolve(phrase, note_date, Anchors(birth=note_date, admission=note_date, surgery=note_date))
        dates.find(phrase, note_date)


def found(text: str, anchors: Anchors = Anchors()) -> list[tuple[str, str, str]]:  # noqa: B008
    return [(text[m.start : m.end], str(m.first), str(m.last)) for m in dates.find(text, NOTE, anchors)]


def test_relative_phrases_count_from_the_latest_absolute_date() -> None:
    text = "Admitted on 13 August 2010. Three days later she fell. In May 2012 she died; the following day nothing."
    assert found(text) == [
        ("13 August 2010", "2010-08-13", "2010-08-13"),
        ("Three days later", "2010-08-16", "2010-08-16"),
        ("May 2012", "2012-05-01", "2012-05-31"),
        ("the following day", "2012-05-02", "2012-06-01"),
    ]


def test_longest_first_without_overlap() -> None:
    mentions = dates.find("Seen 8/13/2010 and in early August 2010, and 3 days after surgery.", NOTE, ANCHORS)
    assert [(str(m.first), str(m.last)) for m in mentions] == [
        ("2010-08-13", "2010-08-13"),
        ("2010-08-01", "2010-08-10"),
        ("2015-08-02", "2015-08-02"),
    ]
    assert all(a.end <= b.start for a, b in itertools.pairwise(mentions))


def test_deidentified_names_hide_what_is_in_them() -> None:
    assert found("[**First Name (May 2011) 2012**] seen [**2010-8-13**] by [**Last 2150**].") == [
        ("[**2010-8-13**]", "2010-08-13", "2010-08-13")
    ]


def test_what_running_text_says_that_is_no_date() -> None:
    assert found("BP 120/80, murmur 2/6, 2000 mL, 3 months of pain, a 28-year-old man, before and after.") == []
    assert found("A day that is none: 31 February 2010.") == []


def test_birth_is_estimated_from_the_age() -> None:
    text = "A 28-year-old man, ill since age 12."
    assert dates.birth_of(text, NOTE) == date(1987, 2, 2)
    assert [said for said, _, _ in found(text)] == ["age 12"]
    assert dates.birth_of("no age", NOTE) is None
    assert dates.birth_of(text, None) is dates.birth_of(text, date(20, 1, 1)) is None


@pytest.mark.parametrize("piece", ["1, ", "a few ", "19", "3 and ", "[**", "May ", "two-", "1/1", " ", "in the past "])
def test_long_repetitions_are_read_to_their_end(piece: str) -> None:
    text = piece * (100_000 // len(piece)) + ". On 13 August 2010"
    assert dates.find(text, NOTE)[-1].first == date(2010, 8, 13)


def test_maccrobat() -> None:
    if (
        not (data := os.environ.get("CHARTLM_DATA"))
        or not (path := Path(data, "concepts/maccrobat2020.jsonl")).exists()
    ):
        pytest.skip("CHARTLM_DATA with MACCROBAT is needed")
    total = alone = aged = hit = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        note = json.loads(line)
        spans = [(span["start"], span["end"]) for span in note["spans"] if span["label"] == "Date"]
        anchors = Anchors(birth=dates.birth_of(note["text"], NOTE))
        mentions = dates.find(note["text"], NOTE)
        total += len(spans)
        for start, end in spans:
            alone += dates.resolve(note["text"][start:end], NOTE) is not None
            aged += dates.resolve(note["text"][start:end], NOTE, anchors) is not None
            hit += any(m.start < end and start < m.end for m in mentions)
    print(f"{total} dates: {alone} resolved, {aged} with the birth that the note's age says; {hit} found in text")
    assert total == 456
    assert alone / total >= 0.84
    assert aged / total >= 0.90
    assert hit / total >= 0.90
