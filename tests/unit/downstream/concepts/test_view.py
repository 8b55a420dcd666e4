"""The page of annotated notes: whole, harmless, and as it looks in a real browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import Browser, Page, needs_browser

from cluster.errors import ConfigError, DataError
from downstream.concepts import annotate, schema, view
from downstream.concepts.schema import Note, Section, Span

HOSTILE = "<script>window.ran=1</script> </mark></article> &amp; <img src=x onerror='window.ran=2'> fever 😀 end"


def hostile() -> Note:
    """A note that would like to run, and whose attributes would too."""
    start = HOSTILE.index("fever")
    span = Span(
        id="T1", start=start, end=start + 5, label='"><script>', attributes={"mine": "<b>", "negation": "negated"}
    )
    inner = Span(id="T2", start=start + 1, end=start + 3)
    return Note(doc_id="<i>1", text=HOSTILE, spans=[span, inner], sections=[Section(start=0, end=9, label="<u>")])


def test_nothing_of_a_note_is_markup() -> None:
    made = view.page([hostile()]).decode()
    assert not [tag for tag in ("<script", "<img", "<b>", "<i>", "<u>") if tag in made]
    assert made.count("<mark") == 6 + 1  # the legend's, and one of two that overlap
    assert "script-src" not in made
    assert "default-src 'none'" in made


def test_users_mistakes(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="has no note to show"):
        view.main([f"{tmp_path}/none.jsonl"])
    with pytest.raises(ConfigError, match="view what"):
        view.main([])


@needs_browser
def test_browser_shows_the_whole_text_and_what_is_said(tmp_path: Path) -> None:
    text = "PAST MEDICAL HISTORY: Shingles. ASSESSMENT: No zoster. VZV IgG 2.31 high. Father had shingles last summer."
    (tmp_path / "notes.csv").write_text(f'id,when,text\n1,2015-08-02,"{text}"\n')
    concepts = Path(__file__).resolve().parents[4] / "recipes/concepts/zoster.toml"
    out = f"{tmp_path}/out.jsonl"
    annotate.main(["rules", f"{tmp_path}/notes.csv", f"concepts={concepts}", f"out={out}", "date=when"])
    view.main([out])
    schema.write(f"{tmp_path}/bad.jsonl", [hostile()])
    view.main([f"{tmp_path}/bad.jsonl"])
    marks = "[...document.querySelectorAll('article mark')]"
    with Browser() as browser:
        with Page((tmp_path / "out.html").as_uri(), browser) as page:
            looks = page.evaluate(f"{marks}.map(m => m.className)")
            assert looks[:2] == ["past", "negated"]
            assert {"family", "other"} <= set(looks)
            assert len(page.evaluate(f"[...new Set({marks}.map(m => getComputedStyle(m).backgroundColor))]")) >= 4
            sections = "document.querySelectorAll('.section').forEach(one => one.remove())"
            page.evaluate(f"{sections}, document.querySelectorAll('article small').forEach(one => one.remove())")
            assert page.evaluate("document.querySelector('.note').textContent") == text
            assert page.errors == []
            assert len(page.requests) <= 1
        with Page((tmp_path / "bad.html").as_uri(), browser) as page:
            assert page.evaluate("window.ran === undefined")
            assert (
                re.sub(r"<u>|<b> negated", "", page.evaluate("document.querySelector('.note').textContent")) == HOSTILE
            )
