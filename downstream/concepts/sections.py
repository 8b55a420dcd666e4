"""Where a note's sections begin and what they are, from its headings.

    PMHx: asthma.  ALLERGIES:,  None.,…   past_medical_history │ allergies │ …

A heading is looked up in headings.toml; one that is not there is told by its head words, and one that is still unknown
is a section "other", so that it ends the section before it. "LUNGS:" belongs to the section in which it stands. Where
there are no headings, tagger.py reads the words.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

OTHER = "other"
DEFAULT = "physical_exam"  # of a part of the body, where the section it stands in is not known
LONGEST = 80  # characters of a heading

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
def read_headings() -> dict[str, Any]:
    """What headings.toml holds."""
    return tomllib.loads(Path(__file__).with_name("headings.toml").read_text(encoding="utf-8"))


@cache
def _table() -> _Table:
    read = read_headings()
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
