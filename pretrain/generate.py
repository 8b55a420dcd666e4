"""Text from a trained model. Samples are printed and kept in the run directory, and go nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from pydantic import Field

from cluster import config, storage
from cluster.errors import ConfigError
from pretrain.run import Trained, load_trained


class GenerateRecipe(config.Section):
    """`./launch.sh generate RUN prompt="blood loss"`."""

    run: str = Field(description="run directory")
    prompt: str = Field("", description="beginning of the note; of a backward model, its end")
    tokens: int = Field(120, ge=1, description="longest sample")
    samples: int = Field(1, ge=1, description="drawn together")
    temperature: float = Field(0.8, gt=0)
    top_k: int = Field(40, ge=0, description="only the k most likely tokens are drawn from; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="only the likeliest that together have this probability")
    seed: int = 1


def likely(logits_SV: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Chances of the next token [S, V], rows of sum 1: of the `top_k` most likely, and of these the smallest set that
    has probability `top_p` (nucleus sampling, Holtzman et al., arXiv:1904.09751).
    """
    chances_SV = torch.softmax(logits_SV.double() / temperature, 1)
    ordered_SV, order_SV = chances_SV.sort(dim=1, descending=True, stable=True)
    if top_k:
        ordered_SV[:, top_k:] = 0
    ordered_SV /= ordered_SV.sum(1, keepdim=True)
    ordered_SV[ordered_SV.cumsum(1) - ordered_SV >= top_p] = 0
    chances_SV = torch.zeros_like(chances_SV).scatter_(1, order_SV, ordered_SV)
    return chances_SV / chances_SV.sum(1, keepdim=True)


def generate(trained: Trained, recipe: GenerateRecipe, drawn: Callable[[str], None] | None = None) -> list[str]:
    """The prompt and what the model makes of it, until the note ends or `tokens` are drawn. Sample i is drawn by the
    generator of (seed, i). `drawn` is told the text of the first sample as it grows.
    """
    model, tokenizer = trained.model, trained.tokenizer
    ends, backward = (tokenizer.eos_id, tokenizer.bos_id), trained.backward
    draws = [np.random.Generator(np.random.Philox(key=[recipe.seed, sample])) for sample in range(recipe.samples)]
    prompt = [int(token) for token in tokenizer.encode_prompt(trained.clean_text(recipe.prompt))]
    if backward:  # its notes begin with EOS
        prompt = [tokenizer.eos_id] * tokenizer.eos + [token for token in prompt[::-1] if token not in ends]
    samples = [list(prompt) for _ in draws]
    ended = [False for _ in draws]

    def text(sample: int) -> str:
        return tokenizer.decode(samples[sample][::-1] if backward else samples[sample])

    carry = model.initial_carry(recipe.samples)  # type: ignore[operator]
    ahead_ST = torch.tensor([prompt or [ends[backward ^ 1]]] * recipe.samples)
    with torch.no_grad():
        for _ in range(recipe.tokens):
            hidden, carry = model(ahead_ST, carry, None)
            logits_SV = model.logits(hidden.output_BTE[:, -1])  # type: ignore[operator]
            cumulative_SV = likely(logits_SV, recipe.temperature, recipe.top_k, recipe.top_p).numpy().cumsum(1)
            ahead_ST = ahead_ST[:, -1:].clone()
            for sample, draw in enumerate(draws):
                token = int(np.searchsorted(cumulative_SV[sample], draw.random() * cumulative_SV[sample, -1], "right"))
                ended[sample] |= token in ends
                if not ended[sample]:
                    samples[sample].append(token)
                    ahead_ST[sample] = token
            if drawn is not None:
                drawn(text(0))
            if all(ended):
                break
    return [text(sample) for sample in range(recipe.samples)]


def _typewriter() -> Callable[[str], None]:
    """Writes what a growing text has more than the last time; a character that is not whole yet waits."""
    shown = ""

    def write(text: str) -> None:
        nonlocal shown
        whole = text.rstrip("\ufffd")
        if whole.startswith(shown):
            sys.stdout.write(whole[len(shown) :])
            sys.stdout.flush()
            shown = whole

    return write


def main(args: list[str]) -> None:
    """Verb `generate`: a single sample appears on a terminal as it is drawn; all are kept in RUN/samples."""
    recipe = config.load(GenerateRecipe, args, positional="run")
    trained = load_trained(recipe.run)
    if recipe.top_k > trained.tokenizer.vocab_size:
        raise ConfigError(f"top_k={recipe.top_k}: the vocabulary has only {trained.tokenizer.vocab_size} tokens")
    streaming = recipe.samples == 1 and not trained.backward and sys.stdout.isatty()
    samples = generate(trained, recipe, _typewriter() if streaming else None)
    text = "\n\n---\n\n".join(samples)
    name = f"step-{trained.step:08d}-seed-{recipe.seed}-{config.fingerprint(config.dump(recipe))[:8]}.txt"
    kept = storage.join(recipe.run, "samples", name)
    storage.write_bytes(kept, (text + "\n").encode())
    sys.stdout.write(f"{'' if streaming else text}\n\n({kept})\n")
