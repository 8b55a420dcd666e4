"""What headings say of the clauses below them."""

from __future__ import annotations

import pytest

from downstream.concepts import clauses

NOTE = (
    "CHIEF COMPLAINT: Cough.\nPAST MEDICAL HISTORY: Asthma, gout of the left knee; GERD since 2009. 5, 7.\n"
    "ALLERGIES: Latex.\nFAMILY HISTORY: Breast cancer,\nstroke. His mother had, as far as he could remember from what "
    "he was told by his aunt many years ago when still a child, nothing.\nPLAN: Rest."
)


def test_it_says_when_it_was_and_whose_it_is() -> None:
    [note] = clauses.annotated([NOTE])
    said = {span.text: (span.attributes["temporality"], span.attributes["experiencer"]) for span in note.spans}
    past = ("historical", "patient")
    assert said == {
        "Cough": ("current", "patient"),
        **dict.fromkeys(("Asthma", "gout of the left knee", "GERD since 2009"), past),
        **dict.fromkeys(("Breast cancer", "stroke", "His mother had"), ("current", "family")),
        "nothing": ("current", "family"),
    }
    for span in note.spans:
        assert note.text[span.start : span.end] == span.text
    assert "HISTORY" not in note.text
    assert "Latex" not in note.text


@pytest.mark.parametrize(
    "text", ["", "Asthma, gout.", "CHIEF COMPLAINT: Cough.", "PAST MEDICAL HISTORY:", "PMH: 5, 7."]
)
def test_texts_that_say_nothing_give_none(text: str) -> None:
    assert clauses.annotated([text]) == []


def test_the_same_are_chosen_in_whatever_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clauses, "MOST", 20)
    texts = [f"PAST MEDICAL HISTORY: Gout {i}, asthma {i}." for i in range(50)]
    some = clauses.annotated(texts)
    assert len(some) == 10
    assert some == clauses.annotated([*reversed(texts), texts[3]])


def test_what_is_tested_tells_nothing() -> None:
    words = " ".join(f"word{i}" for i in range(60))
    texts = [f"PAST MEDICAL HISTORY: Gout {i}. {words.replace('word', f'{i}x')}." for i in range(3)]
    found = clauses.annotated(texts, [texts[1].replace("Gout", "gout")])
    assert sorted(note.spans[0].text for note in found) == ["Gout 0", "Gout 2"]
