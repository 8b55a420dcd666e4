import math

import pytest
import torch
from corpora import tiny_corpus

from pretrain.evaluate import evaluate
from pretrain.models.awd_lstm import AwdLstm, AwdLstmConfig
from sharding.shards import Corpus


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
    scores = evaluate(model, split, lanes=1, bptt=13)
    model.initial_carry = original  # type: ignore[method-assign]
    assert scores.tokens == split.n_tokens - 1
    assert scores.loss == pytest.approx(nll / scores.tokens, rel=1e-6)
    assert scores.perplexity == pytest.approx(math.exp(nll / scores.tokens), rel=1e-6)
    assert scores.bits_per_byte == pytest.approx(nll / math.log(2) / split.n_bytes, rel=1e-6)
    assert scores.accuracy == pytest.approx((logits.argmax(1) == stream[0, 1:]).double().mean().item())


def test_the_number_of_workers_does_not_change_the_scores(corpus: Corpus, model: AwdLstm) -> None:
    model = AwdLstm(model.config, model.vocab_size)
    split = corpus.split("valid")
    whole = evaluate(model, split, lanes=4, bptt=13)
    sums = [0.0, 0.0]

    def total(nll: torch.Tensor, hits: torch.Tensor) -> list[float]:
        sums[0] += nll.item()
        sums[1] += hits.item()
        return sums

    for rank in range(2):
        apart = evaluate(model, split, 4, 13, range(rank * 2, rank * 2 + 2), total)
    assert apart.loss == pytest.approx(whole.loss, rel=1e-6)
    assert apart.accuracy == whole.accuracy


def test_evaluation_leaves_the_model_in_training_mode(corpus: Corpus, model: AwdLstm) -> None:
    model = AwdLstm(model.config, model.vocab_size).train()
    evaluate(model, corpus.split("valid"), 2, 13)
    assert model.training
