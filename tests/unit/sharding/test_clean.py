"""Cleaning keeps what a note says and replaces what stood for a person."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.clean import CLASS_TOKENS, CleanConfig, clean

KEEP, LOWER = CleanConfig(), CleanConfig(case="lower")


@pytest.mark.parametrize(
    ("kind", "token"),
    [
        ("Known lastname 123", "<name>"),
        ("Name (NI) 12", "<name>"),
        ("First Name8 (NamePattern2)", "<name>"),
        ("Initials (NamePattern4)", "<name>"),
        ("Last Name\n (STitle) 12", "<name>"),
        ("Attending Info 3", "<name>"),
        ("Hospital1 18", "<hospital>"),
        ("Hospital Unit Name 3", "<hospital>"),
        ("Wardname 12", "<hospital>"),
        ("Location (un) 3", "<location>"),
        ("Country", "<location>"),
        ("State 9", "<location>"),
        ("Street Address(2)", "<location>"),
        ("PO Box 4", "<location>"),
        ("2101-10-20", "<date>"),
        ("3-4", "<date>"),
        ("5/6", "<date>"),
        ("2101", "<date>"),
        ("Month/Day (2) 12", "<date>"),
        ("Month (only) 3", "<date>"),
        ("May", "<date>"),
        ("Holiday 2", "<date>"),
        ("Date range (1)", "<date>"),
        ("Year (4 digits)", "<date>"),
        ("Numeric Identifier 12", "<number>"),
        ("Clip Number (Radiology) 12", "<number>"),
        ("SSN", "<number>"),
        ("Medical Record Number 1", "<number>"),
        ("Serial Number 3", "<number>"),
        ("Unit Number 3", "<number>"),
        ("MD Number(1)", "<number>"),
        ("Provider Number", "<number>"),
        ("Job Number 5", "<number>"),
        ("12", "<number>"),
        ("Telephone/Fax (1) 12", "<phone>"),
        ("Pager number 3", "<phone>"),
        ("Age over 90 2", "<age>"),
        ("Company 12", "<other>"),
        ("University/College", "<other>"),
        ("E-mail address 3", "<other>"),
        (" ", "<other>"),
        ("", "<other>"),
    ],
)
def test_deidentification_tags(kind: str, token: str) -> None:
    assert clean(f"Dr.[**{kind}**], seen", KEEP) == f"Dr.{token}, seen"
    assert token in CLASS_TOKENS


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("K 10.2 mg,  5/6 of 10² µl; 50-60%", "K 10.2 mg, 5/6 of 10² µl; 50-60%"),
        ("a\r\nb\rc\n\n\nd\n", "a\nb\nc\n\n\nd\n"),
        ("  HPI:\t80 yo \n   male\u00a0  \n", "HPI: 80 yo\nmale\n"),
        ("a\x00b\u2581c\x07", "a b c"),
        ("[**Name **] and [** open\n[no tag]", "<name> and [** open\n[no tag]"),
        ("[**" + "x" * 300 + "**]", "[**" + "x" * 300 + "**]"),
        (" \t\r\n ", "\n"),
    ],
)
def test_table(text: str, cleaned: str) -> None:
    assert clean(text, KEEP) == cleaned


def test_lower_folds_capitals_and_keeps_class_tokens() -> None:
    assert clean("[**Hospital1 2**] ICU, Dr X", LOWER) == "<hospital> icu, dr x"


@given(st.text(alphabet='a B.1[]*<>\n\r\t"\u00a0\u2028İß', max_size=40) | st.text(max_size=40))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    for config in (KEEP, LOWER):
        once = clean(text, config)
        assert clean(once, config) == once
        assert "  " not in once
        assert "\r" not in once


def test_the_table_in_the_documentation_is_true() -> None:
    page = (Path(__file__).parents[3] / "docs/sharding.md").read_text()
    rows = re.findall(r"^\| `(<\w+>)` \| (.+) \|$", page, re.MULTILINE)
    assert {token for token, _ in rows} == set(CLASS_TOKENS)
    kinds = [(token, kind.strip("` ")) for token, kinds in rows for kind in kinds.split(",")]
    assert len(kinds) > 45
    wrong = {kind: token for token, kind in kinds if clean(f"[**{kind}**]", CleanConfig()) != token}
    assert not wrong
