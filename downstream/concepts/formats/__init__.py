"""Annotated notes from and for the tools that annotators use.

    read      jsonl  brat  doccano  label-studio  xmi  medcattrainer
    write     jsonl  brat  doccano  label-studio  label-studio-predictions

What is written and read back is the same note, key by key; xmi and medcattrainer are read for what they say of spans
and their attributes and codes. Messages name file, note, span and offsets, never text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal

from pydantic import ValidationError

from cluster import logs
from cluster.errors import DataError
from downstream.concepts import schema
from downstream.concepts.formats import brat, doccano, exchange, label_studio, medcattrainer, xmi
from downstream.concepts.formats.exchange import Found, Wrong
from downstream.concepts.schema import Note

Format = Literal["jsonl", "brat", "doccano", "label-studio", "xmi", "medcattrainer"]

_FOUND: dict[str, Callable[[str], Iterator[Found]]] = {
    "brat": brat.found,
    "doccano": doccano.found,
    "label-studio": label_studio.found,
    "xmi": xmi.found,
    "medcattrainer": medcattrainer.found,
}


def read(url: str, format: str, skip_bad: bool = False) -> Iterator[Note]:
    """The notes of a file or folder of that format (a key of READERS). Raises DataError at the first bad one, naming
    file, note and span; with `skip_bad` such notes are left out and counted. A file that cannot be read as such (cut
    JSON, not UTF-8) is an error in any case, but for the formats that have a file for each note.
    """
    if format == "jsonl":
        yield from schema.read(url, skip_bad)
        return
    if format not in _FOUND:
        raise DataError(f"{url}: there is no format {format[:30]!r}; the formats are {', '.join(READERS)}")
    bad = 0
    for found in _FOUND[format](url):
        try:
            note = Note.model_validate(found.parse())
            wrong = schema.problem(note) or exchange.half(note)
        except ValidationError as exc:
            first = exc.errors(include_input=False)[0]
            wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except Wrong as exc:
            wrong = str(exc)
        except DataError as exc:  # it says already what to do
            if not skip_bad:
                raise
            wrong = str(exc)
        if not wrong:
            yield note
            continue
        if not skip_bad:
            raise DataError(
                f"{found.where}: note {found.name}: {wrong}; mend it, or leave such notes out with skip_bad=true"
            )
        bad += 1
    if bad:
        logs.say(f"{url}: {bad:,} bad notes left out")


READERS: dict[str, Callable[[str], Iterator[Note]]] = {name: partial(read, format=name) for name in ("jsonl", *_FOUND)}
WRITERS: dict[str, Callable[[str, Iterable[Note]], int]] = {
    "jsonl": schema.write,
    "brat": brat.write,
    "doccano": doccano.write,
    "label-studio": label_studio.write,
    "label-studio-predictions": partial(label_studio.write, predictions=True),
}

__all__ = ["READERS", "WRITERS", "read"]
