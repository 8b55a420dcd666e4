"""Loss curves as a picture."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from cluster import storage, tracking


def draw_losses(run: str) -> str:
    """Draws train and validation loss of a run over its steps, interruptions marked; returns the URL of the PNG."""
    lines = tracking.read(run)
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]
    resumes = [line for line in lines if line.get("event") == "resumed"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    if training:
        axes.plot(*zip(*training, strict=True), label="train", color="#4878a8", linewidth=1)
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", label="validation", color="#c44e52", markersize=4)
    for index, line in enumerate(resumes):
        label = "interrupted, resumed from the last checkpoint" if index == 0 else None
        axes.axvline(line["interrupted_at"], color="#555555", linestyle=":", label=label)
        axes.axvspan(line["step"], line["interrupted_at"], color="#555555", alpha=0.1, linewidth=0)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.rstrip("/").rsplit("/", 1)[-1])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    pyplot.close(figure)
    url = storage.join(run, "plots", "loss.png")
    storage.write_bytes(url, picture.getvalue())
    return url
