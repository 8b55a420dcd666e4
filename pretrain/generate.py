"""Text from a trained model. Samples are printed and kept in the run directory, and go nowhere else."""

from __future__ import annotations

import sys

import numpy as np
import torch
from pydantic import Field

from cluster import config, storage
from cluster.errors import ConfigError
from pretrain.run import Trained, load_trained


class GenerateRecipe(config.Section):
    """`./launch.sh generate RUN prompt="blood loss"`."""

    run: str = Field(description="run directory")
    prompt: str = ""
    tokens: int = Field(120, ge=1, description="longest sample")
    temperature: float = Field(0.8, gt=0)
    top_k: int = Field(40, ge=1)
    seed: int = 1


def generate(trained: Trained, recipe: GenerateRecipe) -> str:
    """The prompt and what the model makes of it, until the note ends or `tokens` are drawn; a function of the seed."""
    model, tokenizer = trained.model, trained.tokenizer
    draws = np.random.Generator(np.random.Philox(recipe.seed))
    ids = [int(token) for token in tokenizer.encode_prompt(trained.clean_text(recipe.prompt))]
    carry = model.initial_carry(1)  # type: ignore[operator]
    ahead = ids or [tokenizer.bos_id]
    with torch.no_grad():
        for _ in range(recipe.tokens):
            hidden, carry = model(torch.tensor([ahead]), carry, None)
            logits_V = model.logits(hidden.output_BTE[:, -1:]).flatten().double()  # type: ignore[operator]
            best = torch.topk(logits_V, min(recipe.top_k, len(logits_V)))
            chances = torch.softmax(best.values / recipe.temperature, 0).numpy()
            token = int(best.indices[int(np.searchsorted(np.cumsum(chances), draws.random() * chances.sum()))])
            if token in (tokenizer.eos_id, tokenizer.bos_id):
                break
            ids.append(token)
            ahead = [token]
    return tokenizer.decode(ids)


def main(args: list[str]) -> None:
    """Verb `generate`."""
    recipe = config.load(GenerateRecipe, args, positional="run")
    trained = load_trained(recipe.run)
    if recipe.top_k > trained.tokenizer.vocab_size:
        raise ConfigError(f"top_k={recipe.top_k}: the vocabulary has only {trained.tokenizer.vocab_size} tokens")
    text = generate(trained, recipe)
    name = f"step-{trained.step:08d}-seed-{recipe.seed}-{config.fingerprint(config.dump(recipe))[:8]}.txt"
    kept = storage.join(recipe.run, "samples", name)
    storage.write_bytes(kept, (text + "\n").encode())
    sys.stdout.write(f"{text}\n\n({kept})\n")
