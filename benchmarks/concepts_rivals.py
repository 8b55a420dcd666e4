"""negspaCy and medspaCy's ConText on mentions in sentences; run by concepts.py with the Python of another environment.

    PYTHON benchmarks/concepts_rivals.py < asked.jsonl > said.jsonl

A line in: {"text": sentence, "start": …, "end": …}; a line out: by system what it says of that mention, by attribute.
Each is given the mention as the entity and its sentence as all there is, as their own evaluations do. This file imports
nothing of chartlm. An environment: `pip install negspacy==1.1.0 pyrush pysbd loguru medspacy_quickumls "numpy<2"`, and
medspaCy's checkout on PYTHONPATH (its 1.3.1 does not build).
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import spacy
from medspacy.context import ConText
from negspacy.negation import Negex
from negspacy.termsets import termset
from spacy.tokens import Doc, Span

# Attributes that medspaCy sets, and what they are called here.
CONTEXT = {
    "is_negated": ("negation", "negated"),
    "is_historical": ("temporality", "historical"),
    "is_uncertain": ("certainty", "uncertain"),
    "is_hypothetical": ("certainty", "hypothetical"),
    "is_family": ("experiencer", "family"),
}


def asked_of(nlp: Any, line: dict[str, Any]) -> Doc:
    """The sentence with the mention as its only entity."""
    doc = nlp(line["text"])
    for token in doc:
        token.is_sent_start = token.i == 0
    span = doc.char_span(line["start"], line["end"], label="CONDITION", alignment_mode="expand")
    doc.ents = [] if span is None else [Span(doc, span.start, span.end, label="CONDITION")]
    return doc


def main() -> None:
    """Reads, says, and tells the milliseconds a mention on stderr."""
    nlp = spacy.blank("en")
    negex = Negex(nlp, "negex", termset("en").get_patterns(), None, "negex", [])
    context = ConText(nlp)
    spent = {"negspacy": 0.0, "medspacy": 0.0}
    lines = [json.loads(line) for line in sys.stdin]
    for line in lines:
        said: dict[str, dict[str, str]] = {}
        for name, read in (("negspacy", negex), ("medspacy", context)):
            began = time.perf_counter()
            doc = read(asked_of(nlp, line))
            spent[name] += time.perf_counter() - began
            said[name] = {}
            for entity in doc.ents:
                if name == "negspacy" and entity._.negex:
                    said[name]["negation"] = "negated"
                if name == "medspacy":
                    said[name] |= dict(value for flag, value in CONTEXT.items() if getattr(entity._, flag))
        print(json.dumps(said))
    for name, seconds in spent.items():
        print(f"{name}: {1000 * seconds / max(len(lines), 1):.2f} ms a mention", file=sys.stderr)


if __name__ == "__main__":
    main()
