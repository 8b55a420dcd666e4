import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from cluster.errors import ConfigError
from pretrain import plot

EVENTS = (
    {"step": 60, "event": "resumed", "interrupted_at": 72},
    {"step": 91, "event": "skipped"},
    {"step": 95, "event": "spike"},
    {"step": 97, "event": "rolled back", "back_to": 60},
)


def run_of(folder: Path, steps: int, events: tuple[dict[str, Any], ...] = (), every: int = 1) -> str:
    lines: list[dict[str, Any]] = [{"step": 0, "valid_loss": 6.0}]
    for step in range(every, steps + 1, every):
        loss = 3 + 3 * math.exp(-step / 40) + 0.2 * math.sin(step)
        lines.append({"step": step, "loss": loss, "smoothed_loss": loss, "lr": step / steps, "tokens": 100 * step})
        if step % 50 == 0:
            lines.append({"step": step, "valid_loss": loss})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *events]))
    return str(folder)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Figure]:
    """The figures that were made, oldest first; in a working directory of their own."""
    monkeypatch.chdir(tmp_path)
    figures: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures


def told(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_one_run_with_what_happened_to_it(tmp_path: Path, drawn: list[Figure]) -> None:
    run = run_of(tmp_path / "one", 150, EVENTS, every=10)
    plot.main([run + "/"])
    plot.main([run, "x=tokens", "out=tokens.png"])
    for place in ("one/plots/loss.png", "tokens.png"):
        assert (tmp_path / place).read_bytes().startswith(b"\x89PNG")
    for figure, unit in zip(drawn, (1, 100), strict=True):
        losses, rates = figure.axes
        curves = {line.get_label(): line for line in losses.lines}
        assert list(curves["interrupted; grey: trained twice"].get_xdata()) == [72 * unit] * 2
        for event, step in (("skipped", 91), ("spike", 95), ("rolled back", 97)):
            assert list(curves[event].get_xdata()) == [step * unit]
        assert list(curves["validation"].get_xdata()) == [0, 50 * unit, 100 * unit, 150 * unit]
        assert len(rates.lines[0].get_xdata()) == 15
        assert told(figure) == list(curves)


def test_several_runs(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [run_of(tmp_path / "a/run", 100, EVENTS), run_of(tmp_path / "b/run", 80), run_of(tmp_path / "begun", 1)]
    plot.main([*runs, runs[0]])  # one that is given twice is one
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert told(figure) == ["a/run", "b/run", f"{tmp_path.name}/begun", "validation"]
    train, valid, *_ = figure.axes[0].lines
    assert train.get_color() == valid.get_color()
    assert len(figure.axes[0].lines) == 6  # what happened to them is left out


@pytest.mark.parametrize("line", [{"step": 0, "valid_loss": 6.0}, {"step": 1, "loss": 6.0}])
def test_a_single_point(tmp_path: Path, drawn: list[Figure], line: dict[str, Any]) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    plot.draw_losses([str(tmp_path)])
    (axes,) = drawn[0].axes  # no learning rate, no panel
    assert axes.lines[0].get_marker() in ("o", ".")  # a line of one point shows nothing


def test_a_curve_over_tokens_takes_those_of_the_line_before() -> None:
    lines = [{"step": 0, "valid_loss": 6.0}, {"step": 9, "loss": 5.0, "tokens": 900}, {"step": 9, "valid_loss": 4.0}]
    assert plot._curve(lines, "valid_loss", "tokens") == [(0, 6.0), (900, 4.0)]
    assert plot._curve(lines, "valid_loss", "step") == [(0, 6.0), (9, 4.0)]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plot needs a run directory"):
        plot.main(["x=step"])
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl with losses; run \./launch\.sh pretrain first"):
        plot.main([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 6.0}\n')
    with pytest.raises(ConfigError, match="does not count tokens; leave x=tokens out"):
        plot.main([str(tmp_path), "x=tokens"])
