"""Wikitext, the markup of Wikipedia, made prose: headings, lists and the text of links stay.

    wikitext ──► no tags ──► no templates ──► no tables ──► whole links only ──(mwparserfromhell)──► prose

mwparserfromhell needs quadratic time for a bracket that is never closed (100 KB of `[http://x` take 7 s, of `{{a|`
minutes) and most of its time for citations and infoboxes. So what is thrown away anyway goes first, in passes that are
linear in the page, and so do brackets without partner; what is left, it parses well. Over pages of the English
Wikipedia that is 7 MB of dump a second and core, 2 without.
"""

from __future__ import annotations

import bisect
import html
import re

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Tag, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode

# From such a tag to the first end tag of its name stands something else than prose.
_OPAQUE = (
    "categorytree ce chem gallery graph hiero imagemap includeonly indicator inputbox mapframe maplink math ref "
    "references score script section source style syntaxhighlight table templatedata templatestyles timeline"
).split()
_LITERAL = ("nowiki", "pre")
# Tags around prose: these stand between lines, those within one.
_BETWEEN = "blockquote br caption center dd div dl dt h1 h2 h3 h4 h5 h6 hr li ol p poem td th tr ul".split()
_WITHIN = (
    "a abbr b bdi bdo big cite code data del dfn em font i img ins kbd mark nobr noinclude onlyinclude q rb rp rt ruby "
    "s samp small span strike strong sub sup time tt u var wbr"
).split()
_TAG = re.compile(
    rf"<!--|<(?P<end>/?)(?P<name>{'|'.join([*_OPAQUE, *_LITERAL, *_BETWEEN, *_WITHIN])})(?=[\s/>])(?P<rest>[^<>]*)>",
    re.IGNORECASE,
)
_END = {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in [*_OPAQUE, *_LITERAL]}
# Ends a line, also inside a heading, where a line end would break the wikitext. No XML can hold it.
_LINE_END = "\x02"

_BRACES = re.compile(r"\{\{+|\}\}+")
_TABLE = re.compile(r"^[ \t:*#;]*(?P<begin>\{\|)|^[ \t:*#;]*\|\}|^(?P<heading>=)", re.MULTILINE)
# `[[` counts as the beginning of a link only where a title follows.
_LINK = re.compile(r"\[\[(?!\[)(?P<title>[^\[\]{}|\n]+(?=\||\]\]))?|(?P<end>\]\])")
_QUOTES = re.compile("''+")
_MAGIC = re.compile(r"(?<!\w)__([^\W\d_]+)__(?!\w)")
_URL = r"\[(?:(?:[a-z]+:)?//|mailto:)"
_WEB_LINK = re.compile(_URL + r"[^\s\[\]]*(?P<title>[^\[\]\n]*(?:\[\[?[^\[\]\n]*\]\]?[^\[\]\n]*)*)\]", re.IGNORECASE)
_OPEN_WEB_LINK = re.compile(rf"\[(?={_URL[2:]})", re.IGNORECASE)
_OTHER_LANGUAGE = re.compile(r"(?:[a-z]{2,3}(?:-[a-z]+)*|simple):")
_FILE = re.compile(r"[^:]+:.+\.(?:jpe?g|png|gif|svg|tiff?|webp|og[agv]|webm|xcf|djvu|pdf|midi?|flac|wav|mp[34])\s*")

# What templates leave behind: `Albedo ()`, `Adobe (; from Spanish)`, `: a definition`.
_EMPTY = re.compile(r"[ \xa0]\([ \xa0,;]*\)")
_LEADING = re.compile(r"\((?:[ \xa0]*[,;])+[ \xa0]*")
_LEFT = re.compile(r"^[:;,][ \xa0]")


def plain_text(wikitext: str, hidden: frozenset[str]) -> str:
    """The prose of a page. `hidden`: lower-case namespaces whose links show nothing. Raises ParserError."""
    text = _without_tables(_without_templates(_without_tags(wikitext)))
    text = _OPEN_WEB_LINK.sub("&#91;", _WEB_LINK.sub(lambda link: link["title"].lstrip(), text))
    code = mwparserfromhell.parse(_with_whole_links(text, hidden), skip_style_tags=True)
    text = _EMPTY.sub("", _render(code, hidden).replace(_LINE_END, "\n"))
    text = "\n".join(_LEFT.sub("", line.strip(" \t")) for line in _LEADING.sub("(", text).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _without_tags(text: str) -> str:
    """Without comments and tags, and no `<` is left. What stands between <nowiki> is then written as entities."""
    kept: list[str] = []
    endless: set[str] = set()
    place = 0
    while tag := _TAG.search(text, place):
        kept.append(text[place : tag.start()])
        place = tag.end()
        if tag["name"] is None:
            end = text.find("-->", place)
            place = end + 3 if end >= 0 else len(text)
            continue
        name = tag["name"].lower()
        if name in _BETWEEN:
            kept.append(_LINE_END)
        if name not in _END or name in endless or tag["end"] or tag["rest"].endswith("/"):
            continue
        closing = _END[name].search(text, place)
        if closing is None:
            endless.add(name)
            continue
        if name in _LITERAL:
            kept.append(_as_entities(html.unescape(text[place : closing.start()])))
        place = closing.end()
    kept.append(text[place:])
    return "".join(kept).replace("<", "&lt;")


def _as_entities(text: str) -> str:
    return re.sub(r"[^\w\s]|_", lambda char: f"&#{ord(char[0])};", text)


def _without_templates(text: str) -> str:
    """Without `{{…}}` and `{{{…}}}`; braces without partner go alone."""
    opened: list[tuple[int, int]] = []  # where, and how many braces wait for their partners
    gone: list[tuple[int, int]] = []
    for run in _BRACES.finditer(text):
        left = len(run[0])
        if run[0][0] == "{":
            opened.append((run.start(), left))
            continue
        begin = run.start()
        while left >= 2 and opened:
            start, count = opened.pop()
            pairs = min(left, count)
            left, count, begin = left - pairs, count - pairs, start + count - pairs
            if count >= 2:
                opened.append((start, count))
        while gone and gone[-1][0] >= begin:
            gone.pop()
        gone.append((begin, run.end()))
    return _without(text, gone + [(start, start + count) for start, count in opened])


def _without_tables(text: str) -> str:
    """Without `{|…|}`; a table that has no end goes up to the next heading."""
    opened: list[int] = []
    gone: list[tuple[int, int]] = []
    headings: list[int] = []
    for mark in _TABLE.finditer(text):
        if mark["heading"]:
            headings.append(mark.start())
        elif mark["begin"]:
            opened.append(mark.start("begin"))
        else:
            begin = opened.pop() if opened else mark.start()
            while gone and gone[-1][0] >= begin:
                gone.pop()
            gone.append((begin, mark.end()))
    for start in opened:
        after = bisect.bisect(headings, start)
        gone.append((start, headings[after] if after < len(headings) else len(text)))
    return _without(text, gone)


def _with_whole_links(text: str, hidden: frozenset[str]) -> str:
    """Without brackets `[[` and `]]` that have no partner; of files not even the line stays."""
    opened: list[re.Match[str]] = []
    gone: list[tuple[int, int]] = []
    for mark in _LINK.finditer(text):
        if mark["title"]:
            opened.append(mark)
        elif mark["end"] and opened:
            opened.pop()
        else:
            gone.append(mark.span())
    for mark in opened:
        end = text.find("\n", mark.end()) if _is_hidden(mark["title"], hidden) else mark.start() + 2
        gone.append((mark.start(), end if end >= 0 else len(text)))
    return _without(text, gone)


def _without(text: str, gone: list[tuple[int, int]]) -> str:
    """Without these pieces, which may overlap."""
    kept: list[str] = []
    place = 0
    for start, end in sorted(gone):
        kept.append(text[place:start])
        place = max(place, end)
    return "".join([*kept, text[place:]])


def _is_hidden(title: str, hidden: frozenset[str]) -> bool:
    """Whether the link shows a file or nothing; `[[:Category:X]]` is a link like any other."""
    namespace, colon, _ = title.replace("_", " ").strip().partition(":")
    return bool(colon) and (namespace.strip().lower() in hidden or bool(namespace and _FILE.fullmatch(title.lower())))


def _render(code: Wikicode, hidden: frozenset[str]) -> str:
    shown: list[str] = []
    for node in code.nodes:
        if isinstance(node, Text):
            text = _QUOTES.sub(_apostrophes, node.value)
            shown.append(_MAGIC.sub(lambda word: "" if word[1] == word[1].upper() else word[0], text))
        elif isinstance(node, HTMLEntity):
            shown.append(html.unescape(str(node)))
        elif isinstance(node, Heading):
            shown.append(f"\n{_render(node.title, hidden).strip()}\n")
        elif isinstance(node, Wikilink):
            shown.append(_link(node, hidden))
        elif isinstance(node, ExternalLink):
            seen = node.title if node.brackets else node.url
            shown.append("" if seen is None else _render(seen, hidden))
        elif isinstance(node, Tag) and node.wiki_markup == ":" and shown and not shown[-1].endswith("\n"):
            shown.append(":")  # between a term and its definition
    return "".join(shown)


def _link(link: Wikilink, hidden: frozenset[str]) -> str:
    title = _render(link.title, hidden)
    if _is_hidden(title, hidden) or (link.text is None and _OTHER_LANGUAGE.match(title.strip())):
        return ""
    return title.strip().removeprefix(":") if link.text is None else _render(link.text, hidden)


def _apostrophes(quotes: re.Match[str]) -> str:
    """Two, three and five are italics and bold; what is more are apostrophes."""
    number = len(quotes[0])
    return "'" * (number - 5 if number > 5 else number == 4)
