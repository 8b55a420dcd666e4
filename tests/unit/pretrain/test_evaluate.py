import math
from typing import Any

import numpy as np
import pytest
import torch
from corpora import tiny_corpus

from cluster.errors import ConfigError
from pretrain.ensemble import Ensemble, of_one_kind
from pretrain.evaluate import Evaluation, evaluate
from pretrain.models.awd_lstm import AwdLstm, AwdLstmConfig
from pretrain.scoring import Plain
from pretrain.streams import StreamConfig
from sharding.shards import Corpus, Split


def scores_of(model: AwdLstm, split: Split, lanes: int, *more: Any) -> Evaluation:
    words = np.zeros(model.vocab_size, bool)
    scores = evaluate(Plain(model), split, StreamConfig(corpus="", lanes=lanes, bptt=13), *more, begins_word_V=words)
    assert scores is not None
    return scores


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.open(tiny_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> AwdLstm:
    torch.manual_seed(1)
    return AwdLstm(AwdLstmConfig(embedding=8, hidden=12, layers=2), corpus.vocab_size).double()


def test_scores_are_those_of_one_pass_over_the_whole_split(corpus: Corpus, model: AwdLstm) -> None:
    split = corpus.split("valid")
    stream = torch.cat([torch.tensor(split.tokens(note).astype("int64")) for note in range(split.n_notes)])[None]
    carry = {key: value.double() for key, value in model.initial_carry(1).items()}
    with torch.no_grad():
        hidden, _ = model(stream[:, :-1], carry, None)
        logits = model.logits(hidden.output_BTE)[0]
    nll = torch.nn.functional.cross_entropy(logits, stream[0, 1:], reduction="sum").item()
    original = model.initial_carry
    model.initial_carry = lambda lanes: {k: v.double() for k, v in original(lanes).items()}  # type: ignore[method-assign]
    scores = scores_of(model, split, 1)
    model.initial_carry = original  # type: ignore[method-assign]
    assert scores.tokens == split.n_tokens - 1
    assert scores.loss == pytest.approx(nll / scores.tokens, rel=1e-6)
    assert scores.perplexity == pytest.approx(math.exp(nll / scores.tokens), rel=1e-6)
    assert scores.bits_per_byte == pytest.approx(nll / math.log(2) / split.n_bytes, rel=1e-6)
    assert scores.accuracy == pytest.approx((logits.argmax(1) == stream[0, 1:]).double().mean().item())


def test_the_number_of_workers_does_not_change_the_scores(corpus: Corpus, model: AwdLstm) -> None:
    model = AwdLstm(model.config, model.vocab_size)
    split = corpus.split("valid")
    whole = scores_of(model, split, 4)
    sums: list[float] = []

    def total(*parts: torch.Tensor) -> list[float]:
        sums[:] = [a + b.item() for a, b in zip(sums or [0.0] * len(parts), parts, strict=True)]
        return sums

    for rank in range(2):
        apart = scores_of(model, split, 4, range(rank * 2, rank * 2 + 2), total)
    assert apart.loss == pytest.approx(whole.loss, rel=1e-6)
    assert apart.accuracy == whole.accuracy


def test_categories_add_up_to_the_whole(corpus: Corpus, model: AwdLstm) -> None:
    """The loss of a category is that of the targets in its notes, counted by hand."""
    model = AwdLstm(model.config, model.vocab_size)
    split = corpus.split("valid")
    kinds = ["Nursing" if note % 3 else "Radiology" for note in range(split.n_notes)]
    split.column = lambda name: kinds  # type: ignore[method-assign,assignment]
    whole = scores_of(model, split, 1)
    stream = torch.cat([torch.tensor(split.tokens(note).astype("int64")) for note in range(split.n_notes)])[None]
    with torch.no_grad():
        logits = model.eval().logits(model(stream[:, :-1], model.initial_carry(1), None)[0].output_BTE)[0]
    nll = torch.nn.functional.cross_entropy(logits, stream[0, 1:], reduction="none")
    radiology = torch.from_numpy(np.repeat(np.array(kinds) == "Radiology", split.length_of_note))[1:]
    assert whole.loss_of_category.keys() == {"Nursing", "Radiology"}
    assert whole.loss_of_category["Radiology"] == pytest.approx(nll[radiology].mean().item(), rel=1e-5)
    assert whole.loss_of_category["Nursing"] == pytest.approx(nll[~radiology].mean().item(), rel=1e-5)


def test_evaluation_leaves_the_model_in_training_mode(corpus: Corpus, model: AwdLstm) -> None:
    model = AwdLstm(model.config, model.vocab_size).train()
    scores_of(model, corpus.split("valid"), 2)
    assert model.training


def test_words_are_those_of_the_text(corpus: Corpus, model: AwdLstm) -> None:
    """Perplexity a word spreads all nats over the words between blanks."""
    model, split = AwdLstm(model.config, model.vocab_size), corpus.split("valid")
    config = StreamConfig(corpus="", lanes=1, bptt=13)
    scores = evaluate(Plain(model), split, config, begins_word_V=corpus.tokenizer.begins_word)
    assert scores is not None
    words = sum(len(corpus.tokenizer.decode(split.tokens(note)).split()) for note in range(split.n_notes))
    assert scores.word_perplexity == pytest.approx(math.exp(min(scores.loss * scores.tokens / words, 700)), rel=1e-6)


@pytest.mark.parametrize("lanes", [1, 3])
def test_an_ensemble_mixes_probabilities(corpus: Corpus, model: AwdLstm, lanes: int) -> None:
    """Each token's probability is the mean of those of the models, with a carry of its own for each."""
    split, config = corpus.split("valid"), model.config
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(AwdLstm(config, model.vocab_size))
    stream = torch.cat([torch.tensor(split.tokens(note).astype("int64")) for note in range(split.n_notes)])[None]
    with torch.no_grad():
        chances = [m.logits(m(stream[:, :-1], m.initial_carry(1), None)[0].output_BTE)[0].softmax(1) for m in models]
    nll = torch.nn.functional.nll_loss((sum(chances) / 2).log(), stream[0, 1:]).item()  # type: ignore[union-attr]
    found = evaluate(
        Ensemble(models),
        split,
        StreamConfig(corpus="", lanes=lanes, bptt=13),
        begins_word_V=corpus.tokenizer.begins_word,
    )
    assert found is not None
    if lanes == 1:
        assert found.loss == pytest.approx(nll, rel=1e-5)
    else:  # the lanes are cut elsewhere
        assert found.loss == pytest.approx(nll, rel=0.05)
    alone = evaluate(
        Ensemble(models[:1] * 2),
        split,
        StreamConfig(corpus="", lanes=lanes, bptt=13),
        begins_word_V=np.zeros(9999, bool),
    )
    assert alone is not None
    assert alone.loss == pytest.approx(scores_of(models[0], split, lanes).loss, rel=1e-6)


def test_other_vocabularies_and_directions_are_not_mixed() -> None:
    class Run:
        def __init__(self, run: str, sha256: str, backward: bool):
            self.run, self.backward = run, backward
            self.tokenizer = type("Tokenizer", (), {"sha256": sha256})

    of_one_kind([Run("a", "x", False), Run("b", "x", False)])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"b: reads in another vocabulary than a; .*finetune"):
        of_one_kind([Run("a", "x", False), Run("b", "y", False)])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="another direction"):
        of_one_kind([Run("a", "x", False), Run("b", "x", True)])  # type: ignore[list-item]
