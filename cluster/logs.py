"""What a person sees on the terminal: lines, tables, and progress with rate and time left.

No note text goes through here: identifiers and counts only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 160  # a file is as wide as a table
PLAIN_EVERY_SECONDS = 10.0
FOLDED = 16  # letters of the first column that stay in a line

Advance = Callable[[float, str], None]


_elsewhere: Callable[[str], None] | None = None
_plain_every = PLAIN_EVERY_SECONDS


def forward(to: Callable[[str], None], every: float = PLAIN_EVERY_SECONDS) -> None:
    """From now on `say` hands its lines to `to`, and `progress` speaks every so many seconds: workers and tasks have no
    terminal.
    """
    global _elsewhere, _plain_every
    _elsewhere, _plain_every = to, every


def say(line: str) -> None:
    """Prints one line, as it is."""
    if _elsewhere is not None:
        _elsewhere(line)
    else:
        console.print(escape(line))


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; every column after the first is aligned to the right. Where the terminal is too narrow for its
    numbers each row is a line of text, which a terminal can break anywhere.
    """
    widths = [max(cell_len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    if min(widths[0], FOLDED) + sum(widths[1:]) + 3 * len(widths) + 1 > console.width:
        say(title)
        for first, *cells in rows:
            said = [f"{heading} {cell}" for heading, cell in zip(headings[1:], cells, strict=True) if cell]
            say("  ".join([first, *said]))
        return
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for index, heading in enumerate(headings):
        # Numbers stay whole and in one line; what is too long folds, nothing is cut off.
        drawn.add_column(heading, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index > 0)
    for row in rows:
        drawn.add_row(*(escape(cell) for cell in row))
    console.print(drawn)


@contextlib.contextmanager
def progress(label: str, total: float) -> Iterator[Advance]:
    """Shows how far long work has come. The caller calls `advance(done, note)` with the amount done so far
    (of `total`) and a few words (a rate, a loss). On a terminal it is a bar; in a log file a line now and then.
    """
    if console.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        ) as bar:
            task = bar.add_task(label, total=total, note="")

            def move(done: float, note: str = "") -> None:
                bar.update(task, completed=done, note=note)

            yield move
        return
    started = spoken = time.monotonic()
    # When work was first seen and how much was done by then, and the same of when it last moved: whoever calls often
    # brings the same amount again.
    first: tuple[float, float] | None = None
    moved = (0.0, 0.0)
    last = ""

    def advance(done: float, note: str = "") -> None:
        nonlocal spoken, first, moved, last
        now, last = time.monotonic(), note
        first = first or (now, done)
        if done > max(first[1], moved[1]):
            moved = now, done
        if now - spoken >= _plain_every and moved[1] > first[1]:
            spoken = now
            whole = (moved[0] - first[0]) * (total - moved[1]) / (moved[1] - first[1])
            left = max(0.0, whole - (now - moved[0]))
            say(" ".join(filter(None, (f"{label}: {100 * done / total:.0f}%", note))) + f", {left:.0f} s left")

    how = "stopped after"
    try:
        yield advance
        how = "done in"
    finally:
        say(f"{label}: {how} {time.monotonic() - started:.1f} s" + (f"; {last}" if last else ""))
