"""The page of an explanation: what it says, what it survives, and how it behaves in a real browser."""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from browser import Browser, Page, needs_browser
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream import explain_page
from downstream.explain_page import SHADES, Explanation, page

SAID = "Mother had shingles. He was given the zoster vaccine in 2019; no rash now."
# Everything that could run, break out of its element or move an offset; family emoji is five code points
HOSTILE = (
    "</pre></title><script>window.ran=1</script>\r\n<img src=x onerror='window.ran=2'> \"&amp;\" & &lt; &#0;\r"
    "\t👩\u200d👩\u200d👧 e\u0301 \u0338> ]]> <!-- \x00\x01\x0b\x0c\x1b\x7f\x92\ud800 \u202eshingles\u202c {{7*7}} "
    "${window.ran=3} javascript:window.ran=4\u2028</style><style>*{display:none}</style>\n\n  end"
)
SEEN = (
    "</pre></title><script>window.ran=1</script>\n<img src=x onerror='window.ran=2'> \"&amp;\" & &lt; &#0;\n"
    "\t👩\u200d👩\u200d👧 e\u0301 \u0338> ]]> <!-- ␀␁␋␌␛␡\ufffd\ufffd \u202eshingles\u202c {{7*7}} "
    "${window.ran=3} javascript:window.ran=4\u2028</style><style>*{display:none}</style>\n\n  end"
)


def explanation(text: str, weights: dict[str, float] | None = None, /, **changed: Any) -> Explanation:
    """Every word of a text with its weight, 1 unless given, as a share; mentions are shingles and zoster."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    raw = [(weights or {}).get(text[start:end].strip(".,;"), 1.0) for start, end in words]
    whole = Explanation(
        note_id="note-7",
        concept=("shingles", "zoster"),
        classes=("current", "past", "family"),
        probabilities=(0.25, 0.0425, 0.7075),
        text=text,
        attention=tuple((start, end, w / sum(raw)) for (start, end), w in zip(words, raw, strict=True)),
        mentions=tuple(match.span() for match in re.finditer("shingles|zoster", text)),
    )
    return whole._replace(**changed)


class Piece(NamedTuple):
    """A piece of the note in the page."""

    text: str
    shade: int
    title: str
    mention: int  # 0: none
    outside: bool


class Reader(HTMLParser):
    """Takes the note's pieces out of a page, with Python's parser."""

    def __init__(self, made: bytes) -> None:
        super().__init__()
        self.pieces: list[Piece] = []
        self.tags: list[str] = []
        self.open: list[dict[str, str]] = []
        self.mentions, self.inside, self.within, self.said = 0, False, False, ""
        self.feed(made.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside |= tag == "main"
        self.mentions += self.inside and tag == "mark"
        self.within |= self.inside and tag == "mark"
        if tag == "span":
            self.open.append({name: value or "" for name, value in attrs})

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self.open.pop()
        self.within &= tag != "mark"
        self.inside &= tag != "main"

    def handle_data(self, data: str) -> None:
        if self.inside:
            span = self.open[-1] if self.open else {}
            kind = span.get("class", "a0").split()[0]
            shade = int(kind[1:]) if kind != "outside" else 0
            mention = self.mentions if self.within else 0
            self.pieces.append(Piece(data, shade, span.get("title", ""), mention, kind == "outside"))
        else:
            self.said += data

    @property
    def note(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def test_shades_follow_the_root_of_the_weight() -> None:
    read = Reader(page(explanation("aa bb cc\ndd", {"aa": 100, "bb": 25, "cc": 0.01, "dd": 1})))
    shades = {piece.text.strip(): piece.shade for piece in read.pieces if piece.text.strip()}
    assert shades == {"aa": SHADES, "bb": SHADES // 2, "cc": 0, "dd": round(SHADES / 10)}
    titles = {piece.text: piece.title for piece in read.pieces if piece.title}
    assert titles == {"aa": "79.4%", "bb": "19.8%", "dd": "0.8%"}


def test_equal_neighbours_are_one_element_with_the_sum() -> None:
    read = Reader(page(explanation("aa bb cc dd", {"aa": 3.0}, mentions=())))
    shaded = [(piece.text, piece.title) for piece in read.pieces if piece.shade]
    assert shaded == [("aa", "50.0%"), ("bb cc dd", "50.0% in 3 words")]


def test_mentions_cut_tokens_and_carry_their_weight() -> None:
    text = "post-shingles pain"
    read = Reader(page(explanation(text, {"pain": 3.0})))
    assert [(piece.text, piece.mention) for piece in read.pieces if piece.text.strip()] == [
        ("post-", 0),
        ("shingles", 1),
        ("pain", 0),
    ]
    assert 'title="mention 1 of 1: 25.0% of the attention"' in page(explanation(text, {"pain": 3.0})).decode()
    assert page(explanation(text)).count(b'data-place="1"') == 1
    overlapping = page(explanation(text, mentions=((5, 13), (0, 9), (14, 18))))
    assert "mention 2 of 2" in overlapping.decode()
    assert {p.text: p.mention for p in Reader(overlapping).pieces if p.mention} == {"post-shingles": 1, "pain": 2}


def test_summary_counts_by_hand() -> None:
    words = [f"w{n}" for n in range(100)]
    words[50] = "zoster"
    weights = {"zoster": 30.0, "w30": 10.0, "w29": 5.0, "w70": 10.0, "w71": 5.0}
    made = explanation(" ".join(words), dict.fromkeys(words, 0.0) | weights)
    said = " ".join(Reader(page(made)).said.split())
    assert "50.0% of the attention lies on the mentions, 83.3% within 20 words of them." in said
    assert "it would be 1.0% and 41.0%." in said


def test_summary_of_a_window_and_of_no_mention() -> None:
    made = explanation(SAID)
    window = Reader(page(made._replace(attention=made.attention[2:5])))
    assert [piece.text for piece in window.pieces if piece.outside] == [
        "Mother had ",
        " given the ",
        "zoster",
        " vaccine in 2019; no rash now.",
    ]
    unmentioned = explanation("a cough")
    assert "does not mention" in Reader(page(unmentioned)).said
    unasked = Reader(page(unmentioned._replace(concept=())))
    assert "mention " not in unasked.said.split("{")[0]
    assert "nothing in particular" in unasked.said


def test_most_likely_class_is_marked_once() -> None:
    made = page(explanation(SAID, probabilities=(0.4, 0.4, 0.2))).decode()
    [row] = re.findall(r'<tr class="likely">.*', made)
    assert "<bdi>current</bdi>" in row
    assert 'width="40.00%"' in row
    assert made.count(">most likely<") == 1


def test_strongest_places_stand_apart() -> None:
    words = [f"w{n}" for n in range(200)]
    made = page(explanation(" ".join(words), {"w50": 90.0, "w51": 80.0, "w71": 60.0, "w150": 70.0})).decode()
    places = sorted((int(n), word) for n, word in re.findall(r'data-place="(\d+)"[^>]*>(\w+)<', made))
    assert places[:3] == [(1, "w50"), (2, "w150"), (3, "w71")]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"attention": ((0, 6, 0.5), (70, 75, 0.5))}, "70-75 .* 74 "),
        ({"attention": ((-1, 6, 0.5),)}, "-1-6"),
        ({"attention": ((3, 3, 0.5),)}, "3-3"),
        ({"attention": ((0, 6, 0.5), (5, 8, 0.5))}, "5-8 .* 6,"),
        ({"attention": ((7, 9, 0.5), (0, 6, 0.5))}, "0-6 .* 9,"),
        ({"attention": ((0, 6, -0.1),)}, "0-6 .* -0.1"),
        ({"attention": ((0, 6, float("nan")),)}, "0-6 .* nan"),
        ({"mentions": ((11, 75),)}, "11-75"),
        ({"mentions": ((12, 11),)}, "12-11"),
        ({"probabilities": (0.5, 0.5)}, "3 classes, 2 probabilities"),
        ({"probabilities": (0.5, 0.5, float("nan"))}, "nan"),
    ],
)
def test_what_cannot_be_is_refused_without_text(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        page(explanation(SAID, **changed))
    assert not re.search(r"shingles|zoster|Mother|rash|note-7", str(caught.value))


def test_hostile_text_stays_text() -> None:
    made = page(explanation(HOSTILE, note_id=HOSTILE, concept=(HOSTILE, HOSTILE), classes=(HOSTILE, "b", "c")))
    read = Reader(made)
    assert read.note == SEEN
    assert {"script": read.tags.count("script"), "style": read.tags.count("style")} == {"script": 1, "style": 1}
    assert "img" not in read.tags
    assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", made)
    assert made.count(b"window.ran=1") == made.count(b"&lt;script&gt;window.ran=1")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_text_and_any_spans(data: st.DataObject) -> None:
    """The page's text is the note's, and every character has its token's shade and its mention."""
    text = data.draw(st.text(st.sampled_from("ab <>&\"'\r\n\t\x00\u0301👩\ud800"), min_size=1, max_size=40))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    tokens = [(a, b, data.draw(st.sampled_from([0.0, 0.01, 0.2, 0.5]))) for a, b in itertools.pairwise(cuts)]
    kept = tuple(token for token in tokens if data.draw(st.booleans()))
    places = st.integers(0, len(text) - 1)
    mentions = tuple((a, max(a, b) + 1) for a, b in data.draw(st.lists(st.tuples(places, places), max_size=4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain_page, "BLOCK", data.draw(st.sampled_from([1, 4, 2000])))
        read = Reader(page(explanation("x", text=text, attention=kept, mentions=mentions)))
    seen = {"\x00": "␀", "\ud800": "\ufffd"}
    expected, wanted = "", []
    highest = max((weight for *_, weight in kept), default=0.0) or 1.0
    for at, sign in enumerate(text):
        if sign == "\r" and text[at + 1 : at + 2] == "\n":
            continue
        expected += "\n" if sign == "\r" else seen.get(sign, sign)
        if not sign.isspace():  # blanks between equal tokens are shaded with them
            shade = sum(round(SHADES * (w / highest) ** 0.5) for a, b, w in kept if a <= at < b)
            wanted.append((shade, any(a <= at < b for a, b in mentions), not any(a <= at < b for a, b, _ in kept)))
    assert read.note == expected
    got = [(p.shade, p.mention > 0, p.outside) for p in read.pieces for sign in p.text if not sign.isspace()]
    assert got == wanted


@pytest.mark.timeout(60)
def test_a_long_note_is_a_page_still() -> None:
    generator = np.random.default_rng(0)
    text = "word " * 200_000
    spans = [(5 * n, 5 * n + 4) for n in range(200_000)]
    mentions = tuple(spans[100:200_000:1000])

    def made(weights: np.ndarray) -> bytes:
        attention = tuple((a, b, float(w)) for (a, b), w in zip(spans, weights / weights.sum(), strict=True))
        return page(explanation("x", text=text, attention=attention, mentions=mentions))

    assert len(made(generator.random(200_000))) < 15e6  # of every shade: as bad as it can be
    assert len(made(np.exp(3 * generator.standard_normal(200_000)))) < 3e6  # as a softmax makes them
    even = made(np.ones(200_000))
    assert len(even) < 1.1e6
    blocks = [re.sub(rb"<[^>]*>", b"", block) for block in even.split(b"</div><div>")]
    assert len(blocks) > 50
    assert max(map(len, blocks[1:-1])) < 20_000  # browsers take quadratic time


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Shows a page, made into a file, in the browser."""
    with contextlib.ExitStack() as stack:

        def shown(made: bytes, **how: Any) -> Page:
            file = tmp_path / "page.html"
            file.write_bytes(made)
            return stack.enter_context(Page(file.as_uri(), browser, **how))

        yield shown


LONG = "\n".join(f"line {n} of a note" if n % 150 else f"line {n} is of shingles and zoster" for n in range(1, 451))
IN_VIEW = """(() => {
  const here = document.querySelectorAll(".here"), bar = document.querySelector("nav").getBoundingClientRect();
  const box = here[0]?.getBoundingClientRect();
  return box && here.length === 1 && box.top >= bar.bottom && box.bottom <= innerHeight;
})()"""


@needs_browser
def test_browser_buttons_and_keys_lead_to_the_places(show: Callable[..., Page]) -> None:
    weights = {"150": 200.0, "shingles": 20.0, "400": 100.0}
    tab = show(page(explanation(LONG, weights)))

    def now() -> tuple[str, str]:
        assert tab.evaluate(IN_VIEW)
        return tab.evaluate("document.querySelector('.here').textContent"), tab.evaluate(
            "document.querySelector('#said').value"
        )

    assert tab.evaluate("scrollY") == 0
    assert not tab.evaluate(IN_VIEW)
    tab.press("next")
    first, said = now()
    assert (first, said[:17]) == ("shingles", "mention 1 of 6: 0")
    top = tab.evaluate("scrollY")
    assert top > 1000
    tab.key("n", 78)
    assert now()[0] == "zoster"
    tab.key("N", 78)
    assert now()[1].startswith("mention 3 of 6")
    assert tab.evaluate("scrollY") > top + 1000
    for _ in range(3):
        tab.press("previous")
    assert now()[1].startswith("mention 6 of 6")
    tab.press("next")
    assert now()[0] == "shingles"
    tab.press("strongest")
    place, said = now()
    assert (place, said[:14]) == ("150", "place 1 of 10:")
    tab.key("s", 83)
    assert now()[0] == "400"
    tab.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    tab.key("Tab", 9)
    assert tab.evaluate("document.activeElement.tagName") == "BUTTON"
    tab.evaluate("document.getElementById('next').focus({preventScroll: true})")
    tab.key("Enter", 13)
    assert now()[0] == "zoster"
    assert tab.errors == []
    assert tab.requests == [tab.url]


@needs_browser
def test_browser_strip_shows_and_leads(show: Callable[..., Page]) -> None:
    tab = show(page(explanation(LONG, {"400": 5000.0})))
    painted = tab.evaluate("""(() => {
      const {width, height} = document.querySelector("canvas");
      const {data} = document.querySelector("canvas").getContext("2d").getImageData(0, 0, width, height);
      const column = x => [...Array(height).keys()].map(y => [...data.slice(4 * (y * width + x)).slice(0, 4)]);
      return [column(4), column(width - 4)];
    })()""")
    ticks = {round(y / 800, 1) for y, (_, _, blue, alpha) in enumerate(painted[0]) if alpha and blue > 200}
    assert ticks == {0.3, 0.7, 1.0}
    strongest = max(range(800), key=lambda y: painted[1][y][3])
    assert strongest / 800 == pytest.approx(400 / 450, abs=0.01)
    tab.press("strip")
    seen = tab.evaluate(
        "(box => (innerHeight / 2 - box.top) / box.height)(document.getElementById('note').getBoundingClientRect())"
    )
    assert seen == pytest.approx(0.5, abs=0.01)
    view = tab.evaluate("(box => (box.top + box.bottom) / 2)(document.getElementById('view').getBoundingClientRect())")
    assert view == pytest.approx(400, abs=4)
    assert tab.errors == []


@needs_browser
def test_browser_shows_hostile_text_and_runs_none(show: Callable[..., Page]) -> None:
    made = explanation(
        HOSTILE, {"👩\u200d👩\u200d👧": 9.0}, note_id=HOSTILE, concept=(HOSTILE,), classes=(HOSTILE, "b", "c")
    )
    tab = show(page(made))
    assert tab.evaluate("document.getElementById('note').textContent") == SEEN
    assert tab.evaluate("document.querySelector('[data-place=\"1\"]').textContent") == "👩\u200d👩\u200d👧"
    assert tab.evaluate("document.querySelector('#note mark').textContent") == "shingles"
    assert tab.evaluate("document.title") == re.sub("[ \t\n]+", " ", SEEN) + ": where the classifier looked"
    assert tab.evaluate("typeof window.ran") == "undefined"
    assert tab.evaluate("getComputedStyle(document.getElementById('note')).whiteSpaceCollapse") == "preserve"
    assert tab.errors == []
    assert tab.requests == [tab.url]


@contextlib.contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """The address of a server on loopback, and the paths that it has been asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


@needs_browser
def test_browser_policy_holds_where_escaping_would_not(show: Callable[..., Page]) -> None:
    """Also shows that errors, requests and the server hear what they should."""
    made = page(explanation(SAID))
    with listener() as (url, asked):
        bad = "<script>window.ran=1</script><img src=URL/x onerror=window.ran=2><b style=color:red><base href=//a>"
        bad += "<link rel=stylesheet href=URL/y><iframe src=URL/z></iframe>"
        hostile = made.replace(b"Mother", bad.replace("URL", url).encode())
        tab = show(hostile)
        assert tab.evaluate("typeof window.ran") == "undefined"
        assert len([said for said in tab.errors if "Content Security Policy" in said]) >= 5
        assert asked == []
        tab = show(re.sub(rb"<meta http-equiv[^>]*>", b"", hostile))
        assert set(asked) == {"/x", "/y", "/z"}
        assert {f"{url}{path}" for path in asked} <= set(tab.requests)
        assert tab.evaluate("window.ran") in (1, 2)
    tab = show(made.replace(b'"use strict"', b'"use  strict"'))
    assert tab.evaluate("document.querySelector('nav').hidden")  # a script that is not ours does not run
    assert "Content Security Policy" in tab.errors[0]


@needs_browser
def test_browser_driver_hears_exceptions_and_the_console(show: Callable[..., Page], tmp_path: Path) -> None:
    tab = show(b"<!DOCTYPE html><script>console.warn('said'); throw Error('thrown')</script>")
    assert "Error: thrown" in str(tab.errors)
    assert "'said'" in str(tab.errors)
    tab.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    with Page(tab.url) as alone:  # in a browser of its own
        assert alone.requests == [tab.url]
        assert alone.evaluate("innerWidth") == 1200


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_text_can_be_read_on_every_shade(show: Callable[..., Page], scheme: str) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1, in both schemes."""
    words = [f"w{n}" for n in range(1, SHADES + 1)]
    made = explanation(" ".join(words), {word: float(n * n) for n, word in enumerate(words, 1)})
    tab = show(page(made._replace(text=f"{made.text} outside")), scheme=scheme)
    colours = tab.evaluate("""[...document.querySelectorAll("#note span")].map(span =>
      [getComputedStyle(span).color, getComputedStyle(span).backgroundColor])""")
    [paper] = {tab.evaluate("getComputedStyle(document.body).backgroundColor")}

    def numbers(colour: str) -> list[float]:
        found = [float(number) for number in re.findall(r"[\d.]+", colour)]
        return found if len(found) == 4 else [*found, 1.0]

    def luminance(rgb: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert (luminance(numbers(paper)[:3]) > 0.5) == (scheme == "light")
    under = numbers(paper)
    shades = []
    for ink, shade in colours:
        *rgb, alpha = numbers(shade)
        ground = luminance([alpha * over + (1 - alpha) * below for over, below in zip(rgb, under, strict=False)])
        bright, faint = sorted((luminance(numbers(ink)[:3]), ground), reverse=True)
        assert (bright + 0.05) / (faint + 0.05) >= 4.5, (ink, shade)
        shades.append(ground)
    ramp = shades[:SHADES]
    assert len(set(ramp)) == SHADES
    assert ramp == sorted(ramp, reverse=scheme == "light")


@needs_browser
def test_browser_narrow_window_and_print(show: Callable[..., Page]) -> None:
    made = explanation(LONG + "\n" + "x" * 300, note_id="n" * 90, classes=("current", "p" * 60, "f f f"))
    tab = show(page(made), width=320, height=600)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 320
    tab.press("next")
    assert tab.evaluate(IN_VIEW)
    tab.media("print", "dark")
    shown = "id => getComputedStyle(document.querySelector(id)).display"
    assert tab.evaluate(f"['nav', '#strip', '#note'].map({shown})") == ["none", "none", "block"]
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.querySelector('#note span')).printColorAdjust") == "exact"
    assert tab.errors == []


@needs_browser
@pytest.mark.parametrize("text", ["", " ", "cough"])
def test_browser_little_to_show(show: Callable[..., Page], text: str) -> None:
    tab = show(page(explanation("x", text=text, attention=(), concept=())))
    assert tab.evaluate("document.getElementById('note').textContent") == text
    assert tab.evaluate("document.querySelector('nav').hidden")
    tab.key("n", 78)
    tab.press("strip")
    assert tab.errors == []
