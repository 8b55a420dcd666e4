"""Wikipedia: whole pages for every block size, prose out of wikitext, and an error where a dump is cut off."""

from __future__ import annotations

import bz2
import gzip
import html
import json
import os
import re
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mwparserfromhell
import pytest
from mwparserfromhell.parser import ParserError

from cluster import storage
from cluster.errors import DataError, StorageError
from sharding.readers import ranges, wikipedia
from sharding.readers.wikipedia import WikipediaReader
from sharding.readers.wikitext import plain_text
from sharding.schema import Block

WIKI = Path(os.environ.get("CHARTLM_DATA", "none")) / "wiki"
ENGLISH = WIKI / "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
TABLES = WIKI / "enwiki-table-markup.xml.bz2"
BULGARIAN = WIKI / "bgwiki-latest-pages-articles-shortened.xml.bz2"
needs_wiki = pytest.mark.skipif(not WIKI.is_dir(), reason="CHARTLM_DATA names no folder with wiki/")

READER = WikipediaReader()
HIDDEN = frozenset(wikipedia.HIDDEN_NAMES)
HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="bg">
  <siteinfo><namespaces>
    <namespace key="0" case="first-letter" />
    <namespace key="6" case="first-letter">Файл</namespace>
    <namespace key="7" case="first-letter">Файл беседа</namespace>
    <namespace key="14" case="first-letter">K &amp; C</namespace>
  </namespaces></siteinfo>
"""
TAIL = "</mediawiki>\n"


def page(number: int, text: str = "", namespace: int = 0, redirect: bool = False) -> str:
    return (
        f"  <page>\n    <title>Title {number}</title>\n    <ns>{namespace}</ns>\n    <id>{number}</id>\n"
        + ('    <redirect title="x" />\n' if redirect else "")
        + "    <revision><id>99</id><timestamp>2012-01-31T13:45:00Z</timestamp><contributor><id>7</id></contributor>"
        + f'<text xml:space="preserve">{html.escape(text)}</text></revision>\n  </page>\n'
    )


PAGES = [page(number, f"'''Secret''' {number} & <b>é 漢</b> " * (number % 9 + 1)) for number in range(1, 30)]
PAGES[3] = page(4, "secret", namespace=1)
PAGES[4] = page(5, "#REDIRECT [[secret]]", redirect=True)
PAGES[5] = page(6, "{{secret}}")
DUMP = "".join([HEAD, *PAGES, TAIL])


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(url: str, block_bytes: int) -> tuple[list[dict[str, Any]], list[Block], dict[str, int]]:
    """Notes whose `record` counts over the file, blocks, drops."""
    found: list[dict[str, Any]] = []
    drops: dict[str, int] = {}
    before = 0
    blocks = list(READER.blocks(url, block_bytes))
    for block in blocks:
        parsed = READER.parse(block)
        assert parsed.records == parsed.notes.num_rows + sum(parsed.drops.values())
        found += [note | {"record": before + note["record"]} for note in parsed.notes.to_pylist()]
        drops = {reason: drops.get(reason, 0) + count for reason, count in parsed.drops.items()}
        before += parsed.records
    return found, blocks, drops


def test_pages_of_a_dump(tmp_path: Path) -> None:
    found, (block,), drops = read(write(tmp_path / "wiki.xml", DUMP), 1 << 20)
    assert drops == {"namespace": 1, "redirect": 1, "unparsable": 0}
    assert [note["record"] for note in found] == [0, 1, 2, *range(5, 29)]
    assert found[0] == {
        "record": 0,
        "doc_id": "1",
        "patient_id": "1",
        "encounter_id": None,
        "category": None,
        "time": "2012-01-31 13:45:00",
        "text": "Title 1\nSecret 1 & é 漢 Secret 1 & é 漢",
    }
    assert found[3]["text"] == ""  # nothing but a template: dropped later as empty
    assert block.header == ("file", "image", "category", "файл", "k & c")


PACKED = {
    "wiki.xml": lambda pieces: b"".join(pieces),
    "wiki.xml.gz": lambda pieces: b"".join(map(gzip.compress, pieces)),
    "wiki.xml.bz2": lambda pieces: bz2.compress(b"".join(pieces)),
    # As Wikipedia writes it: the head, pages by the hundred, the tail, each a stream of its own.
    "wiki-multistream.xml.bz2": lambda pieces: b"".join(map(bz2.compress, pieces)),
}


@pytest.mark.parametrize("name", PACKED)
def test_the_same_notes_and_blocks_for_every_block_size_and_packing(tmp_path: Path, name: str) -> None:
    pieces = [HEAD, "".join(PAGES[:10]), "".join(PAGES[10:20]), "".join(PAGES[20:]), TAIL]
    url = write(tmp_path / name, PACKED[name]([piece.encode() for piece in pieces]))
    plain = write(tmp_path / "plain.xml", DUMP)
    begins = [match.start() for match in re.finditer(b"<page>", DUMP.encode())]
    whole = read(plain, 1 << 20)
    for block_bytes in [*range(1, 1200, 37), 5000, 1 << 20]:
        found, blocks, drops = read(url, block_bytes)
        assert (found, drops) == (whole[0], whole[2])
        # The rule: block i holds the pages that begin in bytes [i·B, (i+1)·B).
        firsts = {begin // block_bytes: begin for begin in reversed(begins)}
        assert [block.start for block in blocks] == sorted(firsts.values())
        assert all(first.end == second.start for first, second in pairwise(blocks))
        assert [(b.start, b.end) for b in blocks] == [(b.start, b.end) for b in read(plain, block_bytes)[1]]
        assert all((block.data is None) == (name == "wiki.xml") for block in blocks)
        assert b"".join(map(ranges.data_of, blocks)) == "".join(PAGES).lstrip().encode()
        assert blocks[-1].stored_end <= Path(url).stat().st_size


def test_how_the_file_is_read_does_not_move_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write(tmp_path / "wiki.xml", DUMP)
    whole = [(block.start, block.end) for block in READER.blocks(url, 700)]
    for piece_bytes in (1, 3, 7, 100, 1001):
        monkeypatch.setattr(wikipedia, "PIECE_BYTES", piece_bytes)
        assert [(block.start, block.end) for block in READER.blocks(url, 700)] == whole


def test_a_dump_in_memory_and_a_dump_without_pages(tmp_path: Path) -> None:
    url = "memory://readers/wiki.xml.bz2"
    storage.write_bytes(url, bz2.compress(DUMP.encode()))
    assert read(url, 500)[0] == read(write(tmp_path / "wiki.xml", DUMP), 500)[0]
    storage.remove(url)
    assert read(write(tmp_path / "wiki.xml", HEAD + TAIL), 500) == ([], [], {})


@pytest.mark.parametrize("block_bytes", [1, 500, 1 << 20])
@pytest.mark.parametrize("name", PACKED)
def test_a_dump_that_is_cut_off(tmp_path: Path, name: str, block_bytes: int) -> None:
    data = DUMP.encode()
    last = data.rindex(b"<page>")
    for end, said in [
        (last + 100, f"ends inside the page at byte {last} without"),
        (len(data) - len(TAIL) - 5, f"ends inside the page at byte {last} without"),
        (len(data) - len(TAIL), f"ends at byte {len(data) - len(TAIL)} without"),
        (len(data) - 5, f"ends at byte {len(data) - 5} without"),
        (last, f"ends at byte {last} without"),
    ]:
        url = write(tmp_path / name, PACKED[name]([data[:1000], data[1000:end]]))
        with pytest.raises(DataError, match=said) as caught:
            read(url, block_bytes)
        assert "ecret" not in str(caught.value)


@pytest.mark.parametrize("name", ["wiki.xml.gz", "wiki.xml.bz2", "wiki-multistream.xml.bz2"])
def test_a_packed_dump_that_is_cut_off_or_damaged(tmp_path: Path, name: str) -> None:
    pieces = [HEAD.encode(), *(piece.encode() for piece in PAGES), TAIL.encode()]
    data = PACKED[name](pieces)
    for end in (len(data) - 1, len(data) - 20, len(data) // 2):
        url = write(tmp_path / name, data[:end])
        with pytest.raises(DataError, match=r"cut off or damaged \(after byte \d+|ends .* at byte \d+ without"):
            read(url, 500)
    if "multistream" in name:
        # Python's decompressor takes what follows a whole stream and is none for waste.
        place = data.index(b"BZh", len(data) // 2)
        with pytest.raises(DataError, match=r"at byte \d+ without </mediawiki>"):
            read(write(tmp_path / name, data[:place] + b"XX" + data[place + 2 :]), 500)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (DUMP.replace("<id>7</id>", "<id>7<id>", 1), "the page at byte {page1} is not well-formed XML"),
        (DUMP.replace("</page>", "", 1), "the page at byte {page1} "),
        (DUMP.replace("  <page>", "  secret<page>", 2), "no page at byte {end1}"),
        (DUMP.replace("<id>1</id>", ""), "the page at byte {page1} has no id, ns or title"),
        (DUMP.replace("<ns>0</ns>", "", 1), "the page at byte {page1} has no id, ns or title"),
        (DUMP + DUMP, "no page at byte"),
        (DUMP + "<secret>", "goes on after its end at byte"),
        (DUMP.replace("é", "\0", 1), "the page at byte {page1} is not well-formed XML"),
        (DUMP.encode().replace("é".encode(), b"\xff", 1), "the page at byte {page1} is not well-formed XML"),
        (DUMP.encode("utf-16"), "is UTF-16; convert it"),
        ("<html>secret</html>", "no <page> in its first"),
        ("100:12:Secret\n", "is neither a MediaWiki dump"),
        ("", "is neither a MediaWiki dump"),
    ],
)
def test_what_is_no_dump_or_a_damaged_one(tmp_path: Path, content: str | bytes, said: str) -> None:
    url = write(tmp_path / "wiki.xml", content)
    stored = Path(url).read_bytes()
    places = {"page1": stored.find(b"<page>"), "end1": stored.find(b"</page>") + len("</page>")}
    for block_bytes in (1, 300, 1 << 20):
        with pytest.raises(DataError) as caught:
            read(url, block_bytes)
        assert said.format(**places) in str(caught.value)
        assert "ecret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        read(str(tmp_path / "none.xml.bz2"), 500)


def test_a_page_the_parser_gives_up_on_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(text: str, **options: Any) -> Any:
        if " 7 " in text:
            raise ParserError("secret")
        return parse(text, **options)

    parse = mwparserfromhell.parse
    monkeypatch.setattr(mwparserfromhell, "parse", give_up)
    found, _, drops = read(write(tmp_path / "wiki.xml", DUMP), 500)
    assert drops == {"namespace": 1, "redirect": 1, "unparsable": 1}
    assert "7" not in [note["doc_id"] for note in found]


EXTRACTED = [
    {
        "id": "12",
        "revid": "1",
        "url": "https://x",
        "title": "Anarchism",
        "text": "Anarchism is a secret.\n\nMore \u2028.",
    },
    {"id": "25", "url": "https://x", "title": "Autism", "text": "A secret."},
    {"id": 39, "url": "https://x", "title": "Albedo", "text": ""},
    {"id": "40", "url": "https://x", "title": "Albedo", "text": "Albedo\n\nA secret."},
]


@pytest.mark.parametrize("name", ["wiki_00", "wiki_00.bz2"])
def test_lines_of_wikiextractor(tmp_path: Path, name: str) -> None:
    content = "".join(json.dumps(found) + "\n" for found in EXTRACTED).encode()
    url = write(tmp_path / name, b"\n" + (content if name == "wiki_00" else b""))
    if name != "wiki_00":
        write(tmp_path / name, bz2.compress(b"\n" + content))
    for block_bytes in (1, 100, 1 << 20):
        found, blocks, drops = read(url, block_bytes)
        assert [note["text"] for note in found] == [
            "Anarchism is a secret.\n\nMore \u2028.",
            "Autism\nA secret.",
            "",
            "Albedo\n\nA secret.",
        ]
        assert [note["doc_id"] for note in found] == [note["patient_id"] for note in found] == ["12", "25", "39", "40"]
        assert {note["category"] for note in found} == {None}
        assert drops == {}
        assert len(blocks) == {1: 5, 1 << 20: 1}.get(block_bytes, len(blocks))
    for cut in range(10, len(content) - 1):
        write(tmp_path / "cut", content[:cut])
        if content[cut - 1 : cut] in b"}\n" or content[cut : cut + 1] == b"\n":
            continue  # a whole record
        with pytest.raises(DataError, match=r"the record at byte \d+ is not JSON") as caught:
            read(str(tmp_path / "cut"), 100)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("'''Bold''' ''italic'' '''''both''''' l''''a''' don't", "Bold italic both l'a don't"),
        ("[[bus]]es, [[Bus (disambiguation)|omnibus]], [[#Part|part]]", "buses, omnibus, part"),
        ("a [[File:x.jpg|thumb|A [[link]] and {{t|]]}} [http://x y]]] b", "a  b"),
        ("[[Image:x.jpg|thumb|two\nlines]]b", "b"),
        ("[[Bild:X.JPG|mini|ein Bild]]b", "b"),
        ("[[:File:x.jpg]] and [[:Category:X|all of X]]", "File:x.jpg and all of X"),
        ("a\n[[Category:X]]\n[[category: Y|*]]\n[[de:A]]\n[[zh-min-nan:A]]\n[[simple:A]]", "a"),
        ("[[wikt:word|word]] [[doi:10.1/2|here]] [[Star Trek: Picard]]", "word here Star Trek: Picard"),
        ("{{Infobox\n| a = {{b|{{{c|}}}}}\n}}\nText{{cite|x={{y}}}}.", "Text."),
        ("{{a}} x }} y {{b", "x  y b"),
        ("a\n{| class=x\n|-\n| b || {{c|}}\n{|\n| d\n|}\n| e\n|}\nf", "a\n\nf"),
        ("a\n:{|\n| b\n|}\nc\n{|\n| never closed\n== H ==\nd", "a\n\nc\n\nH\n\nd"),
        ("a\n{|\n| b\n| c", "a"),
        ("a<ref>x [[y]] {{z}}</ref>b<ref name=q />c<REF name='r'>x</REF>d<ref>e", "abcde"),
        ("a<!-- x\n{{ -->b<!-- to the end {{", "ab"),
        ("<math>x^2</math>a<gallery>\nFile:x.jpg|y\n</gallery>b<timeline>x</timeline><score>c</score>", "ab"),
        ("<syntaxhighlight lang=c>int x;</syntaxhighlight>a<source>y</source>", "a"),
        (
            "H<sub>2</sub>O, <span style='x'>red</span> <small>s</small> x < y > z <unknown>",
            "H2O, red s x < y > z <unknown>",
        ),
        ("== A <br> ''b'' ==\ntext\n=== [[C|D]] ===\n====E====", "A\nb\n\ntext\n\nD\n\nE"),
        ("* a\n** b\n# c\n: d\n; term : definition\n----\ne", "a\nb\nc\nd\nterm : definition\n\ne"),
        ("a&nbsp;b &amp; &lt;c&gt; &#233; &#xD800; &nosuch; & d", "a\xa0b & <c> é \ufffd &nosuch; & d"),
        ("<nowiki>[[a]] {{b}} ''c'' __TOC__ &lt;</nowiki> <pre>{| d |}</pre>", "[[a]] {{b}} ''c'' __TOC__ < {| d |}"),
        ("<nowiki>* a", "a"),
        ("__TOC__\n__NOEDITSECTION__ a __init__ b__TOC__", "a __init__ b__TOC__"),
        ("__БЕЗСЪДЪРЖАНИЕ__ a __目次__", "a"),
        (
            "[http://x.org the [[site]] of x] [http://y.org] http://z.org [mailto:a@b c] [1]",
            "the site of x  http://z.org c [1]",
        ),
        ("Albedo ({{IPA|x}}) is ({{lang|y}}; a b) f()", "Albedo is (a b) f()"),
        ("[[a b [[c]] d]] e\n[[f\ng]]", "a b c d e\nf\ng"),
        ("a [[File:x.jpg|thumb|never closed\nb", "a\nb"),
        ("a\n\n\n\n\nb\n{{x}}\n\n{{y}}\n\nc", "a\n\nb\n\nc"),
        ("", ""),
    ],
)
def test_prose_of_wikitext(wikitext: str, prose: str) -> None:
    assert plain_text(wikitext, HIDDEN) == prose


ENDLESS = [
    *("[[", "{{", "{{a|", "[[a|", "[[File:a|", "[http://x ", "[", "[[a|{{b|<i>''", "]]", "}}", "\n{|\n|", "\n==a"),
    *("<b>", "<x>", "<ref>", "<!--", "<nowiki>[", "''a", "\n*:;", "&#", "__A", "( ,"),
]


@pytest.mark.parametrize("piece", ENDLESS)
def test_brackets_that_are_never_closed_take_no_quadratic_time(piece: str) -> None:
    started = time.process_time()
    text = plain_text(piece * (200_000 // len(piece)), HIDDEN)
    assert time.process_time() - started < 12  # quadratic: minutes
    assert not re.search(r"\{\{|\[\[[^\[]", text)


@pytest.mark.parametrize("piece", ["{{a|", "[[a|", "[[File:a|", "\n{|\n|", "<b>"])
def test_deep_nests_do_not_crash(piece: str) -> None:
    ends = {"{{": "}}", "[[": "]]", "\n{": "\n|}", "<b": "</b>"}
    text = plain_text(piece * 5000 + "x" + ends[piece[:2]] * 5000 + "end", HIDDEN)
    assert text.endswith("end")


LEFTOVERS = [
    *(r"thumb\|", r"\]\]", r"\[\[", r"\{\{", r"\}\}", r"\{\|", r"\|\}", r"\|-", "(?m)^[|!]", "(?m)^[*#:;]"),
    *(
        "<ref",
        r"</?[a-z]+[ />]",
        "Category:",
        "File:",
        "Image:",
        "''",
        r"__[A-Z]+__",
        r"\[http",
        "-->",
        r"&\w+;",
        "\n\n\n",
    ),
]


def leftovers(texts: Sequence[str]) -> dict[str, int]:
    counts = {pattern: sum(len(re.findall(pattern, text)) for text in texts) for pattern in LEFTOVERS}
    return {pattern: count for pattern, count in counts.items() if count}


@needs_wiki
def test_206_pages_of_the_english_wikipedia() -> None:
    found, blocks, drops = read(str(ENGLISH), 100_000)
    assert drops == {"namespace": 1, "redirect": 99, "unparsable": 0}
    assert len(found) == 106
    assert len(blocks) > 30
    assert found == read(str(ENGLISH), 1 << 22)[0]
    texts = [note["text"] for note in found]
    assert leftovers(texts) == {}
    assert sum(map(len, texts)) == pytest.approx(2_900_000, rel=0.01)
    anarchism = texts[0].split("\n")
    assert anarchism[0] == "Anarchism"
    assert anarchism[1].startswith(
        "Anarchism is a political philosophy that advocates self-governed societies based on"
    )
    assert "Etymology and terminology" in anarchism


@needs_wiki
def test_pages_with_many_tables() -> None:
    found, _, drops = read(str(TABLES), 1 << 20)
    assert [note["doc_id"] for note in found][:1] == ["217916"]
    assert len(found) == 5
    assert sum(drops.values()) == 0
    assert leftovers([note["text"] for note in found]) == {}


@needs_wiki
def test_names_of_the_bulgarian_wikipedia(tmp_path: Path) -> None:
    # This piece was stored as UTF-16 by who shortened it.
    with pytest.raises(DataError, match="is UTF-16"):
        read(str(BULGARIAN), 1 << 20)
    url = write(tmp_path / "bg.xml", bz2.decompress(BULGARIAN.read_bytes()).decode("utf-16"))
    (note,), (block,), drops = read(url, 1 << 20)
    assert drops == {"namespace": 2, "redirect": 0, "unparsable": 0}
    assert block.header == ("file", "image", "category", "файл", "категория")
    assert note["text"].startswith("Григориански календар\nГригорианският календар (понякога")
    assert leftovers([note["text"]]) == {}
    assert "Категория:" not in note["text"]
