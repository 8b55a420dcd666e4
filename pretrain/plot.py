"""Loss curves as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from cluster import config, logs, storage, tracking
from cluster.errors import ConfigError

COLOURS = ("#4878a8", "#c44e52", "#5a9e6f", "#8172b3", "#cc8963", "#64b5cd", "#937860", "#d18ab8")
GREY = "#555555"
STYLES = ("-", "--", "-.", ":")  # when there are more runs than colours
EVENTS = {"skipped": "x", "spike": "+", "rolled back": "1"}
MARK = {"color": "black", "markersize": 7, "markeredgewidth": 1.2, "zorder": 4}
LONGEST_NAME = 40
WIDTH_LETTERS = 125  # of the legend, in its type

Curve = list[tuple[float, float]]


class PlotRecipe(config.Section):
    """`./launch.sh plot RUN [RUN…]`."""

    out: str | None = Field(None, description="PNG; RUN/plots/loss.png, or loss.png for several runs, if not given")
    x: Literal["step", "tokens"] = Field("step", description="what the curves run over")


def _curve(lines: Sequence[dict[str, Any]], key: str, x: str) -> Curve:
    """(x, value) of every line that has the key; the tokens of a line without are those of the line before."""
    found, tokens = [], 0
    for line in lines:
        tokens = line.get("tokens", tokens)
        if key in line:
            found.append((line["step"] if x == "step" else tokens, line[key]))
    return found


def _draw(axes: Any, curve: Curve, style: str = "-", **how: Any) -> None:
    """A line; a single point, of which a line would show nothing, as a dot."""
    if curve:
        axes.plot(*zip(*curve, strict=True), "." if len(curve) == 1 and style in STYLES else style, **how)


def _names(runs: Sequence[str]) -> list[str]:
    """What to call the runs: the last parts of their places, as many as tell them apart, cut in the middle."""
    parts = [run.rstrip("/").split("/") for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(runs)):
            break
    half = LONGEST_NAME // 2
    return [name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}" for name in names]


def draw_losses(runs: Sequence[str], out: str | None = None, x: str = "step") -> str:
    """Draws train and validation loss and learning rate of some runs; returns the URL of the PNG. Of one run, what
    happened to it is marked: interruptions, skipped steps, spikes.
    """
    from matplotlib import ticker  # slow to import, and only needed here
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    found, names, alone = [tracking.read(run) for run in runs], _names(runs), len(runs) == 1
    panels = 1 + any("lr" in line for lines in found for line in lines)
    ratios = (4, 1)[:panels]
    figure = Figure(dpi=120, layout="constrained")  # no pyplot: it needs no display and keeps no state
    parts = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=ratios)
    axes, below = parts[0, 0], parts[-1, 0]
    for index, (lines, name) in enumerate(zip(found, names, strict=True)):
        colour, style = COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]
        losses, smoothed = _curve(lines, "loss", x), _curve(lines, "smoothed_loss", x)
        label = ("train, smoothed" if smoothed else "train") if alone else name
        if alone and smoothed:
            _draw(axes, losses, color=colour, linewidth=0.8, alpha=0.35, label="train")
        _draw(axes, smoothed or losses, style, color=colour, linewidth=1.4, label=label)
        mark = {"label": "validation"} if alone else {}
        _draw(axes, _curve(lines, "valid_loss", x), "o", color=colour, markersize=6, markeredgecolor="white", **mark)
        if panels == 2:
            _draw(below, _curve(lines, "lr", x), style, color=colour, linewidth=1.2)
    if alone:
        _mark_events(axes, found[0], x)
    axes.set(ylabel="loss (nats per token)")
    below.set(xlabel="tokens trained on" if x == "tokens" else "step")
    below.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    below.xaxis.set_major_formatter(ticker.EngFormatter(sep="") if x == "tokens" else "{x:,.0f}")
    if panels == 2:
        below.set(ylabel="learning rate", ylim=(0, None))
    for part in parts[:, 0]:
        part.spines[["top", "right"]].set_visible(False)
        part.ticklabel_format(axis="y", useOffset=False)
    handles, labels = axes.get_legend_handles_labels()
    if not alone:
        handles.append(Line2D([], [], color=GREY, marker="o", linestyle="none", markersize=6))
        labels.append("validation")
    columns = max(1, WIDTH_LETTERS // (6 + max(map(len, labels))))
    figure.set_size_inches(9, 4 + panels + 0.2 * -(-len(labels) // columns))
    # Above the curves, never on them.
    figure.legend(
        handles,
        labels,
        title=names[0] if alone else None,
        alignment="left",
        ncols=columns,
        loc="outside upper left",
        fontsize="small",
        frameon=False,
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    url = out or (storage.join(runs[0], "plots", "loss.png") if alone else "loss.png")
    storage.write_bytes(url, picture.getvalue())
    return url


def _mark_events(axes: Any, lines: Sequence[dict[str, Any]], x: str) -> None:
    """Interruptions as lines, the steps trained twice as a band, and what else came to pass as small crosses."""
    losses = _curve(lines, "smoothed_loss", x) or _curve(lines, "loss", x)
    tokens = dict(_curve(lines, "tokens", "step"))

    def place(step: int) -> float:
        """Where a step lies on the axis; one without a line of its own, between its neighbours."""
        if x == "step" or not tokens:
            return step
        return float(np.interp(step, [0, *tokens], [0, *tokens.values()]))

    for index, line in enumerate(line for line in lines if line.get("event") == "resumed"):
        label = "interrupted; grey: trained twice" if index == 0 else None
        first, last = place(line["step"]), place(line["interrupted_at"])
        axes.axvline(last, color=GREY, linestyle=":", linewidth=1, label=label)
        axes.axvspan(first, last, color=GREY, alpha=0.1, linewidth=0)
    # A step that was skipped has no loss of its own: its mark lies on the curve.
    xs, ys = [at for at, _ in losses], [loss for _, loss in losses]
    for event, marker in EVENTS.items():
        places = [place(line["step"]) for line in lines if line.get("event") == event]
        if losses:
            _draw(axes, [(at, float(np.interp(at, xs, ys))) for at in places], marker, **MARK, label=event)


def main(args: list[str]) -> None:
    """Verb `plot`."""
    runs = list(dict.fromkeys(word.rstrip("/") or word for word in args if "=" not in word))
    recipe = config.load(PlotRecipe, [word for word in args if "=" in word], None)
    if not runs:
        raise ConfigError("plot needs a run directory: ./launch.sh plot RUN [RUN…]")
    for run in runs:
        lines = tracking.read(run)
        if not any(key in line for line in lines for key in ("loss", "valid_loss")):
            raise ConfigError(f"{run}: has no {tracking.FILE} with losses; run ./launch.sh pretrain first")
        if recipe.x == "tokens" and not any("tokens" in line for line in lines):
            raise ConfigError(f"{run}: its {tracking.FILE} does not count tokens; leave x=tokens out")
    logs.say(f"plot: {draw_losses(runs, recipe.out, recipe.x)}")
