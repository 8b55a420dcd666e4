import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import generate as generating
from pretrain.generate import GenerateRecipe, generate, likely
from pretrain.models.output import Hidden
from sharding.clean import CleanConfig
from sharding.splits import SplitConfig

BOS, EOS, VOCAB = 1, 2, 12


class Alphabet:
    """A tokenizer of letters, so that texts can be read here."""

    bos_id, eos_id, vocab_size, bos, eos = BOS, EOS, VOCAB, True, True

    def encode_prompt(self, text: str) -> list[int]:
        return [BOS, *(ord(letter) - ord("a") + 3 for letter in text)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token - 3 + ord("a")) for token in ids if token not in (BOS, EOS))


class Counting:
    """A model that says, after a letter, the next one, and after `last` the end; `even` of the time any letter."""

    def __init__(self, end: int, last: int, even: bool = False):
        self.end, self.last, self.even, self.seen = end, last, even, []

    def initial_carry(self, lanes: int) -> dict[str, Tensor]:
        return {"h": torch.zeros(lanes, 1)}

    def __call__(self, tokens: Tensor, carry: Any, masks: None) -> tuple[Hidden, Any]:
        self.seen.append(tokens.tolist())
        return Hidden(tokens[..., None].float(), tokens[..., None].float()), carry

    def logits(self, output_SE: Tensor) -> Tensor:
        if self.even:
            return torch.zeros(len(output_SE), VOCAB)
        following = [3 if token in (BOS, EOS) else token + 1 for token in output_SE[:, 0].long().tolist()]
        following = [self.end if token > self.last else token for token in following]
        return torch.full((len(output_SE), VOCAB), -50.0).scatter_(1, torch.tensor(following)[:, None], 50.0)


def trained(model: Counting, backward: bool = False) -> Any:
    return generating.Trained(
        run="run",
        step=1,
        model=model,  # type: ignore[arg-type]
        tokenizer=Alphabet(),  # type: ignore[arg-type]
        clean=CleanConfig(),
        splits=SplitConfig(),
        recipe={"data": {"backward": backward}},
        corpus_fingerprint="",
    )


def asked(**values: Any) -> GenerateRecipe:
    return GenerateRecipe(run="run", **values)


def test_stops_where_the_note_ends() -> None:
    assert generate(trained(Counting(EOS, 7)), asked(prompt="b", samples=2)) == ["bcde", "bcde"]


def test_a_backward_model_writes_what_comes_before_the_prompt() -> None:
    model = Counting(BOS, 7)
    assert generate(trained(model, backward=True), asked(prompt="b")) == ["edcb"]
    assert model.seen[0] == [[EOS, 4]]


def test_without_a_prompt_a_note_begins() -> None:
    model = Counting(EOS, 5)
    assert generate(trained(model), asked()) == ["abc"]
    assert model.seen[0] == [[BOS]]


def test_a_sample_is_that_of_its_seed_however_many_there_are() -> None:
    def drawn(**values: Any) -> list[str]:
        return generate(trained(Counting(EOS, 9, even=True)), asked(top_k=0, tokens=30, **values))

    many = drawn(samples=4)
    assert drawn(samples=2) == many[:2]
    assert len(set(many)) == 4
    assert drawn(samples=4, seed=2) != many


def test_only_the_likeliest_are_drawn_from() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    torch.testing.assert_close(likely(logits, 1.0, 0, 1.0)[0], torch.tensor([0.5, 0.3, 0.15, 0.05]).double())
    torch.testing.assert_close(likely(logits, 1.0, 2, 1.0)[0], torch.tensor([0.625, 0.375, 0, 0]).double())
    torch.testing.assert_close(likely(logits, 1.0, 0, 0.7)[0], torch.tensor([0.625, 0.375, 0, 0]).double())
    torch.testing.assert_close(likely(logits, 1.0, 0, 0.4)[0], torch.tensor([1.0, 0, 0, 0]).double())
    cold = likely(logits, 0.1, 0, 1.0)[0]
    assert cold[0] > 0.99


def test_the_terminal_sees_whole_characters_once(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    write = generating._typewriter()
    for text in ("fe", "fever 38\ufffd", "fever 38°", "fever 38° C"):
        write(text)
    assert out.getvalue() == "fever 38° C"
