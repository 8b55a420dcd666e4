"""What headings say of the text below them, as if it were annotated: clauses of other notes, with their headings gone.

    PAST MEDICAL HISTORY: Asthma, GERD. …  ─►  Asthma, GERD. …      asthma │ gerd: historical, of the patient

Nobody has to label anything for them (distant supervision: Mintz et al. 2009), and they are of one's own hospital. They
are sometimes wrong, so a language model learns from them first, and from annotated notes afterwards (tuned.py).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence

from downstream.concepts import sections
from downstream.concepts.cues import DEFAULTS, OF_SECTION
from downstream.concepts.schema import Note, Span
from downstream.leakage import alike

# What stands under these was long ago or is of somebody else; under those of the second line it is as usual.
SAID = {**OF_SECTION, "social_history": ("temporality", "historical")}
USUAL = frozenset("chief_complaint history_of_present_illness assessment hospital_course".split())
AXES = ("temporality", "experiencer")
MOST = 16_000  # clauses: a language model learns from them in minutes
LONGEST = 10  # words of a clause

_CLAUSE = re.compile(r"[^\s.,;:][^.,;:\n]*")


def annotated(texts: Iterable[str], tested: Sequence[str] = ()) -> list[Note]:
    """Notes of clauses, from texts of which a section says more than that it is as usual; the same ones for the same
    texts, in whatever order. Texts without headings give none, nor do those that are nearly one that is tested.
    """
    found: dict[str, Note] = {}
    count = 0
    for text in sorted(dict.fromkeys(texts), key=lambda text: (zlib.crc32(text.encode()), text)):
        if count >= MOST:
            break
        note = _note(f"clauses-{len(found)}", text)
        if any(span.section in SAID for span in note.spans):
            found[text] = note
            count += len(note.spans)
    notes = [*found.values()]
    known = {a - len(tested) for a, b in alike([*tested, *found]) if a >= len(tested) > b}
    return [note for place, note in enumerate(notes) if place not in known]


def _note(name: str, text: str) -> Note:
    bodies: list[str] = []
    spans: list[Span] = []
    at = 0
    for section in sections.find(text):
        if section.heading is None or section.label not in SAID.keys() | USUAL:
            continue
        body = text[section.heading[1] : section.end].lstrip(" :,\n\t").rstrip()
        axis, value = SAID.get(section.label, ("", ""))
        for start, end in _clauses(body):
            said = {one: value if one == axis else DEFAULTS[one] for one in AXES}
            place = {"start": at + start, "end": at + end, "text": body[start:end]}
            spans.append(Span(id=f"T{len(spans)}", section=section.label, attributes=said, **place))
        bodies.append(body)
        at += len(body) + 1
    return Note(doc_id=name, text="\n".join(bodies), spans=spans)


def _clauses(body: str) -> Iterator[tuple[int, int]]:
    for clause in _CLAUSE.finditer(body):
        words = clause.group().split()
        if len(words) <= LONGEST and any(len(word) > 2 and word.isalpha() for word in words):
            yield clause.start(), clause.start() + len(clause.group().rstrip())
