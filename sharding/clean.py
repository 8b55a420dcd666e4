"""Text of a note as the model sees it: de-identification tags become class tokens, blanks are single.

MIMIC writes `[**Known lastname 123**]` where a name stood. The words in the tag are invented and say nothing,
the kind of thing that stood there does: the tag becomes `<name>`. Lines are kept (headings matter),
indentation is not. Numbers, punctuation and everything else stay as they are. Cleaning twice is cleaning
once.
"""

from __future__ import annotations

import functools
import re
from typing import Literal

from cluster.config import Section


class CleanConfig(Section):
    """`lower` folds capitals: a smaller vocabulary for small corpora."""

    case: Literal["keep", "lower"] = "keep"


# The first row that fits decides. Kinds as the published MIMIC-III preprocessors list them; numbers and
# remarks that follow a kind ("Name (NI) 12", "Hospital1 18") are MIMIC's own counters.
_KINDS: tuple[tuple[str, str], ...] = (
    ("<date>", r"^(\d{4}-\d{1,2}(-\d{1,2})?|\d{1,2}[-/]\d{1,2}([-/]\d{2,4})?|(19|20|21|22)\d\d)$"),
    ("<age>", r"\bage\b"),
    ("<phone>", r"telephone|phone|fax|pager"),
    ("<number>", r"(numeric|serial) |(clip|md|provider|job|record|account|unit) number|ssn|social security"),
    ("<hospital>", r"hospital|\bward|clinic"),
    ("<other>", r"e-?mail|url"),
    ("<location>", r"location|country|\bstate\b|address|po box|street|\bcity\b|\bzip"),
    ("<name>", r"name|initials|(attending|dictator|contact) info"),
    ("<date>", r"\b(date|day|month|year|holiday)\b|\d{4}-\d{1,2}-\d{1,2}"),
    ("<date>", r"^(january|february|march|april|may|june|july|august|september|october|november|december)\b"),
    ("<number>", r"^[\d #.,:/-]*\d[\d #.,:/-]*$"),
)
# Company, University/College, Job, URL, e-mail, the empty tag, and kinds nobody has listed yet.
_OTHER = "<other>"

CLASS_TOKENS: tuple[str, ...] = (*dict.fromkeys(token for token, _ in _KINDS if token != _OTHER), _OTHER)

_ROWS = [(token, re.compile(kinds, re.IGNORECASE)) for token, kinds in _KINDS]
# A tag may be wrapped over lines; the cap keeps a stray "[**" from swallowing the note.
_TAG = re.compile(r"\[\*\*([^\[\]]{0,200}?)\*\*\]")
# Control characters, and the sign SentencePiece writes for a blank.
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1b\x7f\u2581]")


def clean(text: str, config: CleanConfig) -> str:
    """The text with class tokens for tags, `\\n` line ends, and single blanks inside lines only."""
    text = _TAG.sub(lambda tag: _class_token(tag[1]), text)
    text = _UNSEEN.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    # str.split knows every Unicode blank and is faster than a regular expression over all of them.
    text = "\n".join([" ".join(line.split()) for line in text.split("\n")])
    return text.lower() if config.case == "lower" else text


@functools.lru_cache(maxsize=1 << 14)
def _class_token(tag: str) -> str:
    kind = " ".join(tag.split())
    return next((token for token, row in _ROWS if row.search(kind)), _OTHER)
