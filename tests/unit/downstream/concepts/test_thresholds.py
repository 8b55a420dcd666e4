"""From where on a rare value is said, and what counts at all, chosen by what was said of documents left out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from downstream.concepts import regression
from downstream.metrics import Floats, Ints, patient_draws

USUAL, RARE = 0, 1


def held(scores_N: Floats) -> Floats:
    """Log-probabilities of two values whose log-odds these are."""
    return np.stack([-np.logaddexp(0, scores_N), -np.logaddexp(0, -scores_N)], 1)


def drawn(documents_N: Ints) -> Floats:
    return np.stack([*patient_draws([str(one) for one in documents_N], regression.DRAWS, 0)])


def test_macro_f1_of_draws_is_scikit_learns_of_their_mentions() -> None:
    random = np.random.default_rng(0)
    truth_N, said_SN = random.integers(3, size=90), random.integers(3, size=(4, 90))
    draws_DN = drawn(np.arange(90) // 3)
    expected = [
        [f1_score(truth_N, said_N, average="macro", sample_weight=draw_N) for said_N in said_SN] for draw_N in draws_DN
    ]
    assert regression._macro_f1(said_SN, truth_N, draws_DN, 3) == pytest.approx(np.array(expected), abs=1e-12)


def test_one_document_does_not_settle_the_threshold() -> None:
    """Its five mentions move the highest F1 from 1 to 3; who does not draw it does without."""
    scores_N = np.concatenate([np.full(20, -0.7), np.full(5, -2.0), np.full(4, -1.5), np.full(60, -4.0)])
    truth_N = np.concatenate([np.full(25, RARE), np.full(64, USUAL)])
    documents_N = np.concatenate([np.arange(20), np.full(5, 20), np.arange(21, 85)])
    apart = documents_N != 20
    without = regression._offsets(held(scores_N[apart]), truth_N[apart], drawn(documents_N[apart]))[RARE]
    whole = regression._offsets(held(scores_N), truth_N, np.ones((1, len(truth_N))))[RARE]
    several = regression._offsets(held(scores_N), truth_N, drawn(documents_N))[RARE]
    assert without < 1.5 < several < 2.5 < whole


def test_a_value_that_is_said_of_no_document_left_out_moves_nothing() -> None:
    truth_N = np.zeros(8, int)
    assert (regression._offsets(held(np.full(8, -1.0)), truth_N, drawn(np.arange(8))) == 0).all()


@pytest.mark.parametrize("documents", [2, 20])
def test_what_counts_is_a_gain_that_documents_agree_on(documents: int) -> None:
    """One half of the mentions gains what the other loses in part: chance where each is one document."""
    mention_N, truth_N = np.arange(160), np.tile([RARE, USUAL, USUAL, USUAL], 40)
    first_N, rare_N = mention_N < 80, truth_N == RARE
    missed_N = ~first_N & (mention_N % 16 == 0)
    plain_N = np.where(~first_N & rare_N, -2.0, -3.0)
    better_N = np.where((rare_N & ~missed_N) | (~first_N & (mention_N % 16 == 1)), -2.0, -3.0)
    tried = {0.0: held(plain_N), 1.0: held(better_N)}
    draws_DN = drawn((mention_N >= 80).astype(int) if documents == 2 else mention_N % 80 // 4)
    whole = [regression._scores(one, truth_N, draws_DN)[0] for one in tried.values()]
    assert whole[1] > whole[0] + 0.1
    assert regression._likeliest(tried, truth_N, draws_DN) == 1.0
    assert regression._likeliest(tried, truth_N, draws_DN, errors=1.0) == (1.0 if documents == 20 else 0.0)
