"""`./launch.sh view ANNOTATED.jsonl`: annotated notes as an HTML page, for who would rather look than read JSON.

Mentions are marked and coloured by what is said of them, sections named at their beginning, dates and values shown with
what they mean. The page holds the notes, so it loads nothing and runs no script: treat it as you treat the notes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pydantic import Field

from cluster import config, logs, storage
from cluster.config import Place
from cluster.errors import ConfigError, DataError
from downstream.concepts import schema
from downstream.concepts.cues import DEFAULTS
from downstream.concepts.schema import Note, Span
from downstream.explain_page import policy_hash, shown

CSS = """
:root{--page:#fff;--ink:#1a1d21;--soft:#5f6872;--line:#d5dae0;--plain:#bfe3c6;--negated:#f3b8b4;--doubt:#fbe0a0;
  --past:#c9d3f5;--family:#e2c8f0;--other:#e4e7ea;color-scheme:light}
@media screen and (prefers-color-scheme:dark){:root{--page:#14171a;--ink:#e6e9ec;--soft:#98a2ad;--line:#343b43;
  --plain:#1f5230;--negated:#7a2a26;--doubt:#6b5313;--past:#2c3f85;--family:#5c2f75;--other:#3a4148;color-scheme:dark}}
body{margin:0 auto;max-width:62rem;padding:0 1.25rem;background:var(--page);color:var(--ink);
  font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.25rem}
article{margin:1rem 0;border-top:1px solid var(--line)}
h2{font-size:1rem;margin:.75rem 0 .25rem}
.note{white-space:pre-wrap;overflow-wrap:anywhere;line-height:2}
.section{display:block;margin-top:.5rem;color:var(--soft);font-size:.8rem}
mark{padding:.1em .15em;border-radius:3px;color:inherit;background:var(--plain)}
mark.negated{background:var(--negated)}
mark.doubt{background:var(--doubt)}
mark.past{background:var(--past)}
mark.family{background:var(--family)}
mark.other{background:var(--other)}
mark small{margin-left:.35em;color:var(--ink);font-size:.7rem;opacity:.85}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1rem;font-size:.85rem}
footer{padding:1rem 0 2rem;color:var(--soft);font-size:.85rem}
"""
# The first that holds gives the colour: whose it is comes before whether it is there, and that before when.
LOOKS = (
    ("family", "experiencer", ("family", "other"), "of the family"),
    ("negated", "negation", ("negated",), "negated"),
    ("doubt", "certainty", ("uncertain", "hypothetical", "conditional", "generic"), "not certain"),
    ("past", "temporality", ("historical", "future", "not_particular"), "not now"),
)


class ViewRecipe(config.Section):
    """`./launch.sh view ANNOTATED.jsonl [out=FILE]`."""

    annotated: Place = Field(description="annotated notes, JSON lines")
    out: Place | None = Field(None, description="the page; if not given, beside the notes")
    notes: int = Field(50, ge=1, description="so many of them, from the beginning")
    skip_bad: bool = Field(False, description="notes that are wrong are left out and counted")


def main(args: list[str]) -> None:
    """The verb."""
    if sum("=" not in word for word in args) != 1:
        raise ConfigError("view what? give a file of annotated notes")
    asked = config.load(ViewRecipe, [word if "=" in word else f"annotated={word}" for word in args], None)
    found = list(itertools.islice(schema.read(asked.annotated, asked.skip_bad), asked.notes))
    if not found:
        raise DataError(f"{asked.annotated}: has no note to show")
    out = asked.out or f"{asked.annotated.removesuffix('.jsonl')}.html"
    storage.write_bytes(out, page(found))
    logs.say(f"{len(found):,} notes, {sum(len(note.spans) for note in found):,} spans; look at {out}")


def page(notes: Sequence[Note]) -> bytes:
    """The page, UTF-8."""
    policy = f"default-src 'none'; style-src {policy_hash(CSS)}; base-uri 'none'; form-action 'none'"
    looks = [("", "said of the patient, now"), *((name, said) for name, _, _, said in LOOKS), ("other", "date, value")]
    legend = "".join(f'<span><mark class="{name}">{said}</mark></span>' for name, said in looks)
    return f"""<!DOCTYPE html>
<html lang="en" translate="no">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Annotated notes</title>
<style>{CSS}</style>
<h1>Annotated notes</h1>
<p class="legend">{legend}</p>
{"".join(map(_article, notes))}
<footer>This page holds the text of notes: treat it as you treat them.</footer>
</html>
""".encode()


def _article(note: Note) -> str:
    dated = f" · {shown(note.note_date)}" if note.note_date else ""
    heading = f"<h2><bdi>{shown(note.doc_id)}</bdi>{dated}</h2>"
    return f'<article>{heading}<div class="note" dir="auto">{_body(note)}</div></article>\n'


def _body(note: Note) -> str:
    """The text with its marks. Of overlapping spans the one that begins first is shown, and the longest of these."""
    begins = {section.start: section.label for section in note.sections}
    spans = iter(sorted(note.spans, key=lambda span: (span.start, -span.end)))
    shown_spans, done = [], 0
    for span in spans:
        if span.start >= done:
            shown_spans.append(span)
            done = span.end
    taken = {place for span in shown_spans for place in range(span.start + 1, span.end)}
    pieces, at = [], 0
    events: list[tuple[int, Span | str]] = [(span.start, span) for span in shown_spans]
    events += [(start, label) for start, label in begins.items() if start not in taken]
    for place, event in sorted(events, key=lambda one: (one[0], not isinstance(one[1], str))):
        pieces.append(shown(note.text[at:place]))
        at = place
        if isinstance(event, str):
            pieces.append(f'<span class="section">{shown(event)}</span>')
        else:
            pieces.append(_mark(note, event))
            at = event.end
    return "".join([*pieces, shown(note.text[at:])])


def _mark(note: Note, span: Span) -> str:
    look = next((name for name, axis, values, _ in LOOKS if span.attributes.get(axis) in values), "")
    said = [value for axis, value in span.attributes.items() if value != DEFAULTS.get(axis)]
    if span.value is not None:
        look = "other"
        here = note.text[span.start : span.end]
        said += [str(value) for value in span.value.values() if str(value) != here]
    named = span.concept or span.label
    title = ", ".join([named, *(f"{axis}: {value}" for axis, value in span.attributes.items())])
    small = f"<small>{shown(' '.join(said))}</small>" if said else ""
    return f'<mark class="{look}" title="{shown(title)}">{shown(note.text[span.start : span.end])}{small}</mark>'
