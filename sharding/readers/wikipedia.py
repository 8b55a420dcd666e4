"""Wikipedia: the dump of a wiki (`pages-articles.xml`, also `.bz2`, also multistream), or WikiExtractor's JSON lines.

    dump ──► blocks of whole <page>…</page> ──► pages of namespace 0 that are no redirects ──► title + plain text

Block i holds the pages that begin in bytes [i·B, (i+1)·B) of the decompressed dump. `<page>` never stands in a text
(XML writes `&lt;`), so finding it cuts a dump without parsing it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from mwparserfromhell.parser import ParserError

from cluster import storage
from cluster.config import Section
from cluster.errors import DataError
from sharding.readers import ranges
from sharding.readers.csv_file import BOM, UTF16
from sharding.readers.jsonl import JsonlReader
from sharding.readers.wikitext import plain_text
from sharding.schema import Block, Parsed, Run, in_order, notes_table

HEAD_BYTES = 1 << 16
PIECE_BYTES = 1 << 20
PAGE, PAGE_END, DUMP_END = b"<page>", b"</page>", b"</mediawiki>"

# Names of the namespaces 6 (files) and 14 (categories) that every wiki knows beside its own.
HIDDEN_NAMES = ("file", "image", "category")

# The title comes as category and is then put in front of the text.
_EXTRACTED = JsonlReader(text="text", doc_id="id", patient_id="id", category="title")


class WikipediaReader(Section):
    """Articles of a wiki; each is its own patient, so that an article's split stays when the dump grows."""

    name: Literal["wikipedia"] = "wikipedia"

    def blocks(self, url: str, block_bytes: int, run: Run = in_order) -> Iterator[Block]:
        """Blocks of whole pages. Raises DataError where the file is neither of the two, or is cut off."""
        with storage.reader(url) as stream:
            head = ranges.read(stream, url, HEAD_BYTES)
        if head.startswith(UTF16):
            raise DataError(f"{url}: is UTF-16; convert it to UTF-8 first (iconv -f UTF-16 -t UTF-8)")
        begin = head.removeprefix(BOM).lstrip()[:1]
        if begin == b"{":
            yield from _EXTRACTED.blocks(url, block_bytes, run)
        elif begin == b"<":
            yield from _dump_blocks(url, block_bytes)
        else:
            raise DataError(f"{url}: is neither a MediaWiki dump (XML) nor the JSON lines of WikiExtractor")

    def parse(self, block: Block) -> Parsed:
        """The articles of a block; dropped are other namespaces, redirects, and text no parser understands."""
        return _parse_dump(block) if block.header else _parse_extracted(block)


def _parse_extracted(block: Block) -> Parsed:
    parsed = _EXTRACTED.parse(block)
    columns = {name: parsed.notes.column(name).to_pylist() for name in parsed.notes.column_names}
    titles = columns.pop("category")
    texts = [_titled(title or "", text) for title, text in zip(titles, columns.pop("text"), strict=True)]
    return Parsed(notes_table(text=texts, **columns), parsed.records, parsed.drops)


def _titled(title: str, text: str) -> str:
    """The text below its title; an empty one stays empty."""
    return text if not text or text.startswith(title) else f"{title}\n{text}"


def _dump_blocks(url: str, block_bytes: int) -> Iterator[Block]:
    with storage.decompressed(url) as (stream, stored):
        held = bytearray(ranges.read(stream, url, HEAD_BYTES))
        first = held.find(PAGE)
        if first < 0 and DUMP_END in held:
            return
        if first < 0:
            raise DataError(f"{url}: no <page> in its first {HEAD_BYTES:,} bytes; is it a MediaWiki dump?")
        header = _hidden_names(bytes(held[:first]).decode(errors="replace"))
        del held[:first]
        start, ended = first, False

        def block(size: int) -> Block:
            # A plain file is read by the tasks themselves.
            data = np.frombuffer(bytes(held[:size]), np.uint8) if storage.is_compressed(url) else None
            return Block(url, start, start + size, header, data, stored.tell())

        while not ended:
            piece = ranges.read(stream, url, PIECE_BYTES)
            ended = len(piece) < PIECE_BYTES
            held += piece
            while (size := held.find(PAGE, (start // block_bytes + 1) * block_bytes - start)) >= 0:
                yield block(size)
                del held[:size]
                start += size
            if len(held) > block_bytes + ranges.LONGEST_RECORD_BYTES:
                raise DataError(f"{url}: no page begins in the {len(held):,} bytes after byte {start}; is it a dump?")
        size = held.rfind(DUMP_END)
        if size < 0:
            page = held.rfind(PAGE)
            inside = held.find(PAGE_END, page) < 0
            where = f"inside the page at byte {start + page}" if inside else f"at byte {start + len(held)}"
            raise DataError(f"{url}: ends {where} without </mediawiki>; is it cut off?")
        if held[size + len(DUMP_END) :].strip():
            raise DataError(f"{url}: goes on after its end at byte {start + size}; give each dump a file of its own")
        yield block(size)


def _hidden_names(head: str) -> tuple[str, ...]:
    """Lower-case names of the namespaces whose links show no text, by <siteinfo>."""
    local = re.findall(r'<namespace key="(?:6|14)"[^<>]*>([^<]+)</namespace>', head)
    return tuple(dict.fromkeys([*HIDDEN_NAMES, *(html.unescape(name).lower() for name in local)]))


def _parse_dump(block: Block) -> Parsed:
    hidden = frozenset(block.header)
    rows: list[tuple[int, str, str | None, str]] = []
    drops = {"namespace": 0, "redirect": 0, "unparsable": 0}
    records = 0
    for start, page in _pages(block):
        number, records = records, records + 1
        doc_id, namespace, title = (page.findtext(name) for name in ("id", "ns", "title"))
        if not doc_id or not namespace or not title:
            raise DataError(f"{block.url}: the page at byte {start} has no id, ns or title; is it a MediaWiki dump?")
        if namespace != "0":
            drops["namespace"] += 1
            continue
        if page.find("redirect") is not None:
            drops["redirect"] += 1
            continue
        revisions = page.findall("revision")
        wikitext = revisions[-1].findtext("text") if revisions else None
        stamp = revisions[-1].findtext("timestamp") if revisions else None
        try:
            text = plain_text(wikitext or "", hidden)
        except ParserError:
            drops["unparsable"] += 1
            continue
        time = stamp and stamp.replace("T", " ").removesuffix("Z")
        rows.append((number, doc_id, time, f"{title}\n{text}" if text else ""))
    record, ids, times, texts = zip(*rows, strict=True) if rows else ((), (), (), ())
    notes = notes_table(
        record=np.array(record, np.int64), doc_id=list(ids), patient_id=list(ids), time=list(times), text=list(texts)
    )
    return Parsed(notes, records, drops)


def _pages(block: Block) -> Iterator[tuple[int, ElementTree.Element]]:
    """The pages of a block and the byte of the file where each begins."""
    data, place = ranges.data_of(block), 0
    while (begin := data.find(PAGE, place)) >= 0:
        end = data.find(PAGE_END, begin)
        _check_nothing(block, data[place:begin], place)
        place = end + len(PAGE_END)
        where = f"{block.url}: the page at byte {block.start + begin}"
        if end < 0:
            raise DataError(f"{where} has no end; the file is damaged")
        try:
            yield block.start + begin, ElementTree.fromstring(data[begin:place])
        except ElementTree.ParseError:
            raise DataError(f"{where} is not well-formed XML; the file is damaged") from None
    _check_nothing(block, data[place:], place)


def _check_nothing(block: Block, between: bytes, place: int) -> None:
    if between.strip():
        raise DataError(f"{block.url}: no page at byte {block.start + place}; the file is damaged")
