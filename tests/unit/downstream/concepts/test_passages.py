"""Language models that learn what sections look like, and what they count in the tagger."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from annotated import model

from downstream.concepts.learning import TuneConfig
from downstream.concepts.passages import LANES, LONGEST, TunedPassages, _tokens
from downstream.concepts.tagger import SectionTagger

SOON = TuneConfig(epochs=8, lr=0.01, lr_head=0.01)  # for the small random models of these tests


def passages(count: int, turned: bool = False) -> list[tuple[str, str]]:
    """Of two sections, which one of the words tells, among others and in passages of any length."""
    draws = np.random.default_rng(count)
    found = []
    for i in range(count):
        words = [f"w{n}" for n in draws.integers(40, size=draws.integers(1, 30))]
        words.insert(int(draws.integers(len(words))), "zulu" if i % 2 else "today")
        found.append((" ".join(words), "allergies" if (i % 2 == 1) != turned else "habits"))
    return found


def fit(
    others: list[tuple[str, str]], own: list[tuple[str, str]], passed: Callable[[], None] = lambda: None
) -> TunedPassages:
    return TunedPassages.fit([model(), model(True)], others, own, SOON, passed)


def right(tuned: TunedPassages, asked: list[tuple[str, str]]) -> float:
    said = tuned([text for text, _ in asked]).argmax(1)
    return float(np.mean([tuned.names[place] == section for place, (_, section) in zip(said, asked, strict=True)]))


def test_learned_on_some_passages_it_knows_others() -> None:
    own, asked, passes = passages(120), passages(61), []
    tuned = fit([], own, lambda: passes.append(1))
    assert len(passes) == SOON.epochs
    assert right(tuned, asked) > 0.9
    logs_NK = tuned([text for text, _ in asked])
    np.testing.assert_allclose(np.exp(logs_NK).sum(1), 1)
    # In whichever company a passage is read, it is read alike.
    np.testing.assert_allclose(tuned([asked[5][0]])[0], logs_NK[5], atol=1e-4)
    assert (fit([], own)([text for text, _ in asked]) == logs_NK).all()


def test_its_own_passages_count_more_than_those_of_others() -> None:
    passes: list[int] = []
    tuned = fit(passages(150, turned=True), passages(120), lambda: passes.append(1))
    assert len(passes) == 1 + SOON.epochs
    assert right(tuned, passages(60)) > 0.9
    more = fit([("rash", "skin")] * 20, passages(40))
    assert more.names == ("allergies", "habits", "skin")


def test_the_beginning_of_a_passage_is_read_and_nothing_of_an_empty_one() -> None:
    tuned = fit([], passages(40))
    long = "zulu " * LONGEST
    same, other = tuned([long, long + "today " * 50])
    np.testing.assert_allclose(same, other, atol=1e-5)
    assert np.isfinite(tuned(["", *["w1"] * LANES])).all()
    assert tuned([]).shape == (0, 2)
    for forwards, backwards in zip(
        *(_tokens(one, [long, "zulu w1", ""]) for one in (model(), model(True))), strict=True
    ):
        assert len(forwards) <= LONGEST
        assert backwards.tolist() == forwards.flip(0).tolist()


def test_written_and_read_again_it_says_the_same() -> None:
    tuned = fit([], passages(40))
    models, texts = [model(), model(True)], [text for text, _ in passages(20)]
    again = TunedPassages.load(tuned.arrays(), models)
    assert again.names == tuned.names
    np.testing.assert_allclose(again(texts), tuned(texts), atol=1e-6)
    with pytest.raises(KeyError):
        TunedPassages.load({"tuned.classes": tuned.arrays()["passages.classes"]}, models)


class Sure:
    """Says of every passage that it is of one section, as surely as that."""

    names = ("allergies", "habits")

    def __init__(self, log_odds: float):
        self.logs = np.array([0.0, -log_odds]) - np.logaddexp(0, -log_odds)

    def __call__(self, texts: object) -> np.ndarray:
        return np.tile(self.logs, (len(texts), 1))  # type: ignore[arg-type]

    def arrays(self) -> dict[str, object]:
        return {}


def test_the_tagger_hears_them_by_half() -> None:
    texts, labels = zip(*passages(120), strict=True)
    alone = SectionTagger().fit(texts, labels)
    for log_odds in (3.0, -3.0, 30.0):
        both = SectionTagger(tuned=Sure(log_odds)).fit(texts, labels)
        asked = [text for text, _ in passages(30)]
        odds = [np.log(one[:, 0] / one[:, 1]) for one in (alone.probabilities(asked), both.probabilities(asked))]
        np.testing.assert_allclose(odds[1], (odds[0] + log_odds) / 2, atol=1e-3)
    with pytest.raises(ValueError, match="other labels"):
        SectionTagger(tuned=Sure(1)).fit(texts, ["a" if i % 2 else "b" for i in range(120)])
    again = SectionTagger.load(both.save(), tuned=Sure(log_odds))
    np.testing.assert_allclose(again.probabilities(asked), both.probabilities(asked), atol=1e-4)
    for saved, tuned in ((alone.save(), Sure(1)), (both.save(), None)):
        with pytest.raises(ValueError, match="not those that it was fitted with"):
            SectionTagger.load(saved, tuned=tuned)
    others = Sure(1)
    others.names = ("a", "b")
    with pytest.raises(ValueError, match="other labels"):
        SectionTagger.load(both.save(), tuned=others)
