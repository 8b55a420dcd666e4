"""An explanation of a prediction as one HTML page: the note, shaded by where the classifier looked.

For a physician, offline. The page holds the text of a patient, so it loads nothing and can load nothing: its policy
allows its own style and script by their hashes and forbids the rest.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import html
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from downstream.explain_look import CSS, JS

Spans = Sequence[tuple[int, int]]

SHADES = 16
NEAR_WORDS = 20  # on each side of a mention
DARK_LETTERS = 0.6  # from this opacity on black letters are easier to read than white ones on a dark page
LINE_END_SHADE = 5  # a line end is a word, too, but a sign at every weak one would be noise
BLOCK = 2000  # characters
PLACES = 10  # how many strongest places the page leads to, each more than NEAR_WORDS from the others


class Explanation(NamedTuple):
    """What a classifier said of a note and where it looked. Spans are in code points of `text`, end exclusive."""

    note_id: str
    concept: tuple[str, ...]  # what was asked: the concept and its synonyms; empty where nothing was asked
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    text: str
    attention: tuple[tuple[int, int, float], ...]  # (start, end, weight) of tokens, sorted; weights sum to about 1
    mentions: tuple[tuple[int, int], ...]  # where the text mentions what was asked


class _Run(NamedTuple):
    """Neighbouring tokens of one shade (0: too little to see), or, with 0 tokens, what the attention does not reach."""

    start: int
    end: int
    shade: int
    weight: float
    tokens: int
    place: int = 0  # 1 is the strongest


def page(explanation: Explanation) -> bytes:
    """The page, UTF-8. Raises ValueError where offsets or numbers cannot be, naming these, never text."""
    _check(explanation)
    mentions = _merged(explanation.mentions)
    style, script = CSS + _shades(), JS.replace("SHADES", str(SHADES))
    policy = (
        f"default-src 'none'; style-src {policy_hash(style)}; script-src {policy_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    name = shown(explanation.note_id)
    return f"""<!DOCTYPE html>
<html lang="en" translate="no">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="google" content="notranslate">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: where the classifier looked</title>
<style>{style}</style>
<header>
<h1>Where the classifier looked</h1>
<dl><dt>Note</dt><dd><bdi>{name}</bdi></dd>
<dt>Asked</dt><dd>{_asked(explanation.concept)}</dd></dl>
{_bars(explanation)}
{_summary(explanation, mentions)}
<p class="legend">{_legend(explanation)}</p>
</header>
<nav hidden aria-label="Go to">
<button id="next" type="button">Next mention <kbd>N</kbd></button>
<button id="previous" type="button">Previous <kbd>P</kbd></button>
<button id="strongest" type="button">Strongest place <kbd>S</kbd></button>
<output id="said"></output>
</nav>
<main><div id="note" dir="auto" lang="">{_note(explanation, mentions)}</div></main>
<div id="strip" hidden aria-hidden="true" title="The note from end to end: click to go there">\
<canvas></canvas><div id="view"></div></div>
<footer>Attention says where the classifier read, not why it decided. This page holds the text of the note: treat it as
you treat the note.</footer>
<script>{script}</script>
</html>
""".encode()


def _check(explanation: Explanation) -> None:
    length = len(explanation.text)
    for start, end in [*explanation.mentions, *((start, end) for start, end, _ in explanation.attention)]:
        if not 0 <= start < end <= length:
            raise ValueError(f"span {start}-{end} is not in a text of {length} characters")
    done = 0
    for start, end, weight in explanation.attention:
        if start < done:
            raise ValueError(f"attention {start}-{end} begins before {done}, the end of the token before it")
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"attention {start}-{end} has the weight {weight}")
        done = end
    if len(explanation.classes) != len(explanation.probabilities):
        raise ValueError(f"{len(explanation.classes)} classes, {len(explanation.probabilities)} probabilities")
    for probability in explanation.probabilities:
        if not 0 <= probability <= 1 + 1e-6:
            raise ValueError(f"a probability of {probability}")


def _merged(spans: Spans) -> list[tuple[int, int]]:
    """The spans in order, those that overlap as one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _near(text: str, spans: Spans) -> list[tuple[int, int]]:
    """The spans, each with NEAR_WORDS words on both sides."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    starts, ends = [start for start, _ in words], [end for _, end in words]
    wider = []
    for start, end in spans:
        first, last = bisect.bisect_right(ends, start), bisect.bisect_left(starts, end)
        before, after = starts[max(0, first - NEAR_WORDS) : first], ends[last : last + NEAR_WORDS]
        wider.append((min([start, *before]), max([end, *after])))
    return _merged(wider)


def _on(attention: Sequence[tuple[int, int, float]], spans: Spans) -> list[range]:
    """For every span which tokens share a character with it."""
    starts, ends = [start for start, _, _ in attention], [end for _, end, _ in attention]
    return [range(bisect.bisect_right(ends, start), bisect.bisect_left(starts, end)) for start, end in spans]


def _places(explanation: Explanation) -> dict[int, int]:
    """Rank by start of the strongest tokens, each more than NEAR_WORDS words from stronger ones."""
    starts = [match.start() for match in re.finditer(r"\S+", explanation.text)]
    words: list[int] = []
    ranks: dict[int, int] = {}
    for start, _, weight in sorted(explanation.attention, key=lambda token: -token[2]):
        if len(ranks) == PLACES or not weight:
            break
        word = bisect.bisect_right(starts, start)
        if all(abs(word - other) > NEAR_WORDS for other in words):
            words.append(word)
            ranks[start] = len(ranks) + 1
    return ranks


def _runs(explanation: Explanation) -> list[_Run]:
    """The tokens as runs, as few as there can be: a page of every token on its own would be slow."""
    highest = max((weight for _, _, weight in explanation.attention), default=0.0) or 1.0
    places = _places(explanation)
    runs: list[_Run] = []
    done = 0
    for start, end, weight in explanation.attention:
        gap = explanation.text[done:start]
        if gap.strip():
            runs.append(_Run(done, start, 0, 0.0, 0))
        shade = round(SHADES * math.sqrt(weight / highest))
        run = _Run(start, end, shade, weight, 1, places.get(start, 0) if shade else 0)
        last = runs[-1] if runs and gap in ("", " ") else None
        if last and last.shade == run.shade and not last.place and not run.place:
            runs[-1] = last._replace(end=end, weight=last.weight + weight, tokens=last.tokens + 1)
        else:
            runs.append(run)
        done = end
    if explanation.text[done:].strip():
        runs.append(_Run(done, len(explanation.text), 0, 0.0, 0))
    return runs


def _note(explanation: Explanation, mentions: Spans) -> str:
    """The text as HTML. Mentions are around shades, so that a mention is one element."""
    text = _visible(explanation.text)
    runs = _runs(explanation)
    ends = [run.end for run in runs]
    on, cuts = _on(explanation.attention, mentions), _cuts(text)

    def shaded(start: int, end: int) -> Iterator[str]:
        for at in range(bisect.bisect_right(ends, start), len(runs)):
            run = runs[at]
            if run.start >= end:
                break
            first, last = max(run.start, start), min(run.end, end)
            yield _escaped(text[start:first])
            yield _span(run, text[first:last], whole=first == run.start)
            start = last
        yield _escaped(text[start:end])

    def blocks(start: int, end: int) -> Iterator[str]:
        for cut in cuts[bisect.bisect_right(cuts, start) : bisect.bisect_right(cuts, end)]:
            yield from shaded(start, cut)
            yield "</div><div>"
            start = cut
        yield from shaded(start, end)

    parts: list[str] = []
    done = 0
    for number, (start, end) in enumerate(mentions):
        weight = sum(explanation.attention[token][2] for token in on[number])
        parts += blocks(done, start)
        parts += [f'<mark title="mention {number + 1} of {len(mentions)}: {_percent(weight)} of the attention">']
        parts += [*shaded(start, end), "</mark>"]
        done = end
    return "".join(["<div>", *parts, *blocks(done, len(text)), "</div>"])


def _cuts(text: str) -> list[int]:
    """Where the note is cut into blocks, since a browser's time for one is quadratic: at a line's end, for want of one
    at a blank.
    """
    cuts, last = [], 0
    for match in re.finditer("[\n ]", text):
        if match.end() - last >= (BLOCK if match[0] == "\n" else 8 * BLOCK):
            last = match.end()
            cuts.append(last)
    return cuts


def _span(run: _Run, piece: str, whole: bool) -> str:
    """A piece of a run; `whole` is False for what a mention's beginning or end cuts off."""
    if not run.tokens:
        return f'<span class="outside">{_escaped(piece)}</span>'
    if not run.shade:
        return _escaped(piece)
    ends_line = piece.isspace() and "\n" in piece and run.shade >= LINE_END_SHADE
    shade = f"a{run.shade} line-end" if ends_line else f"a{run.shade}"
    place = f' data-place="{run.place}"' if run.place and whole else ""
    words = f" in {run.tokens} words" if run.tokens > 1 else ""
    return f'<span class="{shade}"{place} title="{_percent(run.weight)}{words}">{_escaped(piece)}</span>'


def _asked(concept: Sequence[str]) -> str:
    if not concept:
        return "nothing in particular"
    also = ", ".join(f"<bdi>{shown(name)}</bdi>" for name in concept[1:])
    return f"<b><bdi>{shown(concept[0])}</bdi></b>" + (f" (or {also})" if also else "")


def _bars(explanation: Explanation) -> str:
    likely = max(range(len(explanation.classes)), key=lambda k: explanation.probabilities[k], default=-1)
    rows = []
    for number, (name, probability) in enumerate(zip(explanation.classes, explanation.probabilities, strict=True)):
        kind, said = ("likely", "most likely") if number == likely else ("", "")
        rows.append(
            f'<tr class="{kind}"><th scope="row"><bdi>{shown(name)}</bdi></th><td class="bar">'
            f'<svg width="100%" height="14" aria-hidden="true"><rect width="100%" height="14" rx="3"/>'
            f'<rect width="{100 * min(1.0, probability):.2f}%" height="14" rx="3"/></svg></td>'
            f"<td>{_percent(probability)}</td><td>{said}</td></tr>"
        )
    return "<table><caption>Probability</caption>\n" + "\n".join(rows) + "\n</table>"


def _summary(explanation: Explanation, mentions: Spans) -> str:
    """Where the attention lies, beside what it would be if every word had the same."""
    if not mentions:
        return "<p>The note does not mention what was asked.</p>" if explanation.concept else ""
    said = []
    for spans in (mentions, _near(explanation.text, mentions)):
        tokens = {token for tokens in _on(explanation.attention, spans) for token in tokens}
        weight = sum(explanation.attention[token][2] for token in tokens)
        said.append((_percent(weight), _percent(len(tokens) / max(1, len(explanation.attention)))))
    (on, even_on), (near, even_near) = said
    return (
        f"<p><b>{on}</b> of the attention lies on the mentions, <b>{near}</b> within {NEAR_WORDS} words of them. "
        f"<small>Spread evenly over all words that are not grey, it would be {even_on} and {even_near}.</small></p>"
    )


def _legend(explanation: Explanation) -> str:
    highest = max((weight for _, _, weight in explanation.attention), default=0.0)
    ramp = "".join(f'<span class="a{shade}">\u2002</span>' for shade in range(1, SHADES + 1))
    return (
        f'<span><span class="ramp">{ramp}</span>attention to a word, up to {_percent(highest)}</span>\n'
        f'<mark>mention</mark>\n<span><span class="a{SHADES // 2} line-end"></span> to the end of a line</span>\n'
        '<span class="outside">grey: beyond the attention’s reach</span>'
    )


def _percent(share: float) -> str:
    """HTML of a share, with more digits where it is small."""
    percent = 100 * share
    if 0 < percent < 0.001:
        return "&lt;0.001%"
    return f"{percent:.{3 if 0 < percent < 0.1 else 1}f}%"


# Control signs as pictures of them, half a surrogate pair as U+FFFD: HTML has no other way to hold them. One sign
# stays one, for offsets' sake.
_PICTURES = (
    {sign: 0x2400 + sign for sign in range(32) if chr(sign) not in "\t\n\r"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
)


def _visible(text: str) -> str:
    return re.sub("\r(?!\n)", "\n", text).translate(_PICTURES)


def _escaped(piece: str) -> str:
    """HTML of visible text, for elements and attributes; of CR LF the LF stays."""
    return html.escape(piece.replace("\r", ""))


def shown(text: str) -> str:
    """HTML that shows a text as it is, sign by sign."""
    return _escaped(_visible(text))


def policy_hash(source: str) -> str:
    """What allows a style or script in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _shades() -> str:
    """CSS of the shades. In the dark, letters are white on the weak ones and black on the strong ones."""
    opacities = [(f".a{shade}", 0.95 * shade / SHADES) for shade in range(1, SHADES + 1)]
    shades = "".join(f"{name}{{background:rgb(var(--heat)/{opacity:.3f})}}" for name, opacity in opacities)
    weak = ",".join(name for name, opacity in opacities if opacity < DARK_LETTERS)
    strong = ",".join(name for name, opacity in opacities if opacity >= DARK_LETTERS)
    return f"{shades}@media screen and (prefers-color-scheme:dark){{{weak}{{color:#fff}}{strong}{{color:#000}}}}"
