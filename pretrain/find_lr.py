"""Which learning rate to begin with: a short training in which it rises (Smith 2017, arXiv:1506.01186 §3.3).

Nothing of the run is touched: weights and optimizer are those of a new run, and only a picture and the numbers stay.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch

from cluster import config, logs, storage
from cluster.errors import TrainingError
from pretrain import optim
from pretrain import run as run_directory
from pretrain.engine import Engine, Workers
from pretrain.models import MODELS
from pretrain.models.dropout import Masks
from pretrain.optim import Knobs
from pretrain.plot import COLOURS, GREY
from pretrain.streams import Prefetch, open_streams
from pretrain.train import TrainRecipe

STEPS = 100
RANGE = {"adamw": (1e-6, 10.0), "sgd": (1e-3, 1e4)}
SMOOTHING = 0.9
TOO_FAR = 4.0  # times the lowest loss: there the search ends

Curve = list[tuple[float, float]]  # (learning rate, smoothed loss in nats a token)


def search(recipe: TrainRecipe, advance: logs.Advance) -> Curve:
    """Trains STEPS steps from new weights while the learning rate rises geometrically; ends where the loss explodes."""
    workers = Workers(recipe.engine.timeout_seconds)
    corpora = run_directory.open_corpora(recipe.data)
    lanes = range(recipe.data.lanes)
    streams = open_streams([corpus.split("train") for corpus in corpora], recipe.data, recipe.seed, None)
    torch.manual_seed(recipe.seed)
    model = MODELS[recipe.model.name](recipe.model, corpora[0].vocab_size)
    engine = Engine(
        model, lambda m: optim.build(m, recipe.optim), recipe.engine, workers, recipe.data.lanes, recipe.optim.clip
    )
    lowest, highest = RANGE[recipe.optim.name]
    curve: Curve = []
    carry, average = engine.initial_carry(len(lanes)), 0.0
    batches = Prefetch(streams, lanes, workers.device)
    try:
        for step in range(STEPS):
            lr = lowest * (highest / lowest) ** (step / (STEPS - 1))
            masks, targets = Masks(recipe.seed, step, lanes, workers.device), streams.targets_in(step)
            nll, carry = engine.forward_backward(batches.get(step), carry, masks, targets)
            average = SMOOTHING * average + (1 - SMOOTHING) * nll.item() / targets
            loss = average / (1 - SMOOTHING ** (step + 1))
            if not math.isfinite(loss) or loss > TOO_FAR * min((loss, *(before for _, before in curve))):
                break
            curve.append((lr, loss))
            advance(step + 1, f"lr {lr:.1e}  loss {loss:.3f}")
            engine.update(Knobs(lr))
    finally:
        batches.close()
        workers.close()
    return curve


def valley(curve: Curve) -> float:
    """The learning rate in the middle of the longest fall of the loss (a decreasing subsequence): fastai's `valley`.

    Raises TrainingError where the loss never falls.
    """
    losses = [loss for _, loss in curve]
    longest = [1] * len(losses)
    for end in range(len(losses)):
        longest[end] += max((longest[at] for at in range(end) if losses[at] > losses[end]), default=0)
    if max(longest, default=1) < 10:
        raise TrainingError("find-lr: the loss does not fall at any learning rate; check the corpus and the recipe")
    end = longest.index(max(longest))
    return curve[end - longest[end] // 2][0]


def tenth_of_lowest(curve: Curve) -> float:
    """A tenth of the learning rate at which the loss is lowest."""
    return min(curve, key=lambda point: point[1])[0] / 10


def draw(curve: Curve, suggestions: Sequence[tuple[str, float]], url: str) -> None:
    """Loss over learning rate as a PNG, with the suggestions marked."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True), color=COLOURS[0], linewidth=1.4)
    for (name, lr), style in zip(suggestions, ("--", ":"), strict=True):
        axes.axvline(lr, color=GREY, linestyle=style, linewidth=1.2, label=f"{name}: {lr:.1e}")
    lowest, first = min(loss for _, loss in curve), curve[0][1]
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, smoothed (nats per token)")
    axes.set_ylim(lowest - 0.1 * (first - lowest), first + 0.5 * (first - lowest))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    storage.write_bytes(url, picture.getvalue())


def main(args: list[str]) -> None:
    """Verb `find-lr`: takes what `pretrain` takes; prints a suggestion and draws RUN_DIR/plots/find-lr.png."""
    recipe = config.load(TrainRecipe, args)
    with logs.progress("find-lr", STEPS) as advance:
        curve = search(recipe, advance)
    suggestions = [("middle of the valley", valley(curve)), ("a tenth of the lowest", tenth_of_lowest(curve))]
    url = storage.join(recipe.run_dir, "plots", "find-lr.png")
    draw(curve, suggestions, url)
    storage.write_json(storage.join(recipe.run_dir, "plots", "find-lr.json"), {"curve": curve, **dict(suggestions)})
    logs.say(f"find-lr: begin with optim.lr={suggestions[0][1]:.1e} (the recipe has {recipe.optim.lr:g}); {url}")
