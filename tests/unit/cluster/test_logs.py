"""Progress in a log file, and tables in narrow terminals."""

from __future__ import annotations

import pytest

from cluster import logs


def test_time_left_shrinks_while_the_same_amount_is_brought_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher asks every second how far training is, and its log has a line a minute."""
    now, said = 0.0, list[str]()
    monkeypatch.setattr(logs, "_elsewhere", said.append)
    monkeypatch.setattr(logs, "_plain_every", 10.0)
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    with logs.progress("reading", 100) as advance:
        for second in range(141):
            now = float(second)
            advance(second // 60 * 10, "a note" if second > 130 else "")
    lefts = [int(line.split(", ")[1].split()[0]) for line in said[:-1]]
    # 20 of 100 in the second minute: at first 9 minutes are left; from the third minute on it is 8 at the same rate.
    assert lefts == [540, 530, 520, 510, 500, 490, 480, 470, 460]
    assert said[0] == "reading: 10%, 540 s left"
    assert said[-2] == "reading: 20% a note, 460 s left"
    assert said[-1] == "reading: done in 140.0 s; a note"


@pytest.mark.parametrize("width", [30, 44, 60, 160])
def test_no_cell_of_a_table_is_lost_in_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs.console, "width", width)
    headings = ["value", "system", "F1", "mentions"]
    rows = [["temporality:historical", "reader", "77.7 [66.7, 85.2]", "156"], ["", "rules", "66.0 [49.5, 77.8]", ""]]
    logs.table("every mention", headings, rows)
    said = capsys.readouterr().out
    for cell in ("every mention", "reader", "77.7 [66.7, 85.2]", "156", "66.0 [49.5, 77.8]"):
        assert cell in said
    label = "".join(line.split("│")[1].strip() if "│" in line else line.split("  ")[0] for line in said.splitlines())
    assert "temporality:historical" in label
    assert ("│" in said) == (width > 50)
