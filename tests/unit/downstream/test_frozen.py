"""The frozen mode: topics spread as it serves; states that must earn a place."""

from __future__ import annotations

import numpy as np
import pytest

from downstream import frozen, regression
from downstream.frozen import FrozenConfig
from downstream.tasks.examples import Example

WORDS = {0: "heart valve artery", 1: "knee femur tendon", 2: "retina lens cornea"}
USUAL = ["alpha", "beta", "gamma", "delta", "kappa"]


def notes(count: int, mention: bool = False) -> list[Example]:
    """Of three classes in turn; every second word is of no class. The mention is in the middle."""
    made = []
    for n in range(count):
        random = np.random.default_rng(n)
        own, usual = random.choice(WORDS[n % 3].split(), 6), random.choice(USUAL, 6)
        before, after = (" ".join(f"{a} {b}" for a, b in list(zip(own, usual, strict=True))[k::2]) for k in (0, 1))
        span = (len(before) + 1, len(before) + 7)
        made.append(Example(str(n), f"p{n}", f"{before} zoster {after}", n % 3, (span,) if mention else ()))
    return made


def test_topics_are_spread_as_asked() -> None:
    settings = FrozenConfig(features=("topics",), topics=5)
    found = {}
    for spread in frozen.SPREADS:
        arrays = frozen._learn_blocks(settings, notes(60), np.zeros((60, 0)), [], spread, 1)
        words = frozen.Words(arrays["topic0_terms"], arrays["topic0_idf"])
        found[spread] = np.linalg.norm(words(frozen._views(notes(60))[0]) @ arrays["topic0_axes"].T, axis=0)
    np.testing.assert_allclose(found[1.0], 1, rtol=1e-3)
    np.testing.assert_allclose(found[-1.0], found[0.0] ** 2, rtol=1e-3)


def test_the_spread_of_topics_is_chosen_by_what_is_asked() -> None:
    """Sixty signs that go together make the first axis; a pair of words of a class is far behind the kinds of note."""
    settings = FrozenConfig(features=("topics",), topics=12)
    signs, kinds = [], []
    for n in range(240):
        random = np.random.default_rng(n)
        well = random.normal()
        said = " ".join(f"{'good' if well + random.normal() > 0 else 'poor'}{i}" for i in range(60))
        signs.append(Example(str(n), f"p{n}", said, int(well + 0.5 * random.normal() > 0)))
        kind = random.integers(4)
        usual = [f"kind{kind}x{i}" for i in random.choice(40, 25, replace=False)]
        own = [f"class{n % 2}x{i}" for i in random.choice(16, 2, replace=False)]
        kinds.append(Example(str(n), f"p{n}", " ".join([*usual, *own]), n % 2))
    for examples, even in ((signs, False), (kinds, True)):
        labels = np.array([one.label for one in examples[:60]])
        assert (frozen._spread(settings, examples[:60], labels, examples[60:], 1)[0] == 1.0) is even


def test_the_strength_is_chosen_with_the_spread_where_all_notes_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = FrozenConfig(features=("topics",), topics=5)
    labels = np.array([one.label for one in notes(60)])
    assert len(frozen._spread(settings, notes(60), labels, [], 1)[1]) == 1
    monkeypatch.setattr(frozen, "ENOUGH", 50)
    assert frozen._spread(settings, notes(60), labels, [], 1)[1] == regression.STRENGTHS


def test_topics_beside_a_mention_keep_their_spread() -> None:
    labels = np.array([one.label for one in notes(60)])
    assert frozen._spread(FrozenConfig(), notes(60, mention=True), labels, [], 1)[0] == 0.0


def test_words_count_less_beside_topics_of_whole_notes_and_in_full_elsewhere() -> None:
    settings = FrozenConfig(features=("words", "topics"), topics=5)
    cases = (
        (settings, False, frozen.WORDS),
        (settings, True, 1.0),
        (FrozenConfig(features=("words",)), False, 1.0),
    )
    for asked, mention, share in cases:
        examples = notes(60, mention)
        model = frozen.Frozen(asked, frozen._learn_blocks(asked, examples, np.zeros((60, 0)), [], 0.0, 1))
        rows = model.blocks(examples, None)["words"]
        np.testing.assert_allclose(np.sqrt(rows.multiply(rows).sum(1)), share)
        again = frozen.Frozen.load(asked, model.save()).blocks(examples, None)["words"]
        assert (again != rows).nnz == 0


def test_states_that_say_nothing_are_left_out_and_those_that_say_all_are_used() -> None:
    learned, asked = notes(90), notes(30)
    labels = np.array([one.label for one in learned])
    settings = FrozenConfig(features=("states", "words"))
    noise = np.random.default_rng(3).normal(size=(150, 20))
    told = np.eye(3)[np.arange(150) % 3] + 0.01 * noise[:, :3]
    blank = [one._replace(text="alpha beta gamma delta") for one in (*learned, *asked)]
    for states, texts, none in ((noise, [*learned, *asked], True), (told, blank, False)):
        data = {
            "train": (texts[:60], states[:60], labels[:60]),
            "valid": (texts[60:90], states[60:90], labels[60:]),
            "test": (texts[90:], states[90:120], labels[:30]),
        }
        said, _, about = frozen.fit(settings, data, [], 1)
        assert (about["scale"] == 0.0) is none
        # Of each labelled note, by fits without it, in its own row.
        assert (said["train"].argmax(1) == labels[:60]).mean() > 0.9
        assert (said["valid"].argmax(1) == labels[60:]).mean() > 0.9
        assert (said["test"].argmax(1) == labels[:30]).mean() > 0.9


def test_a_gain_counts_where_it_is_above_its_standard_error_over_patients() -> None:
    """Eight of ten notes are told right, other ones than the seven before: of 20 patients that may be luck."""

    def said(right: list[bool], labels: np.ndarray) -> regression.Choice:
        sure = np.where(right, labels, 1 - labels)
        said_NK = np.eye(2)[sure] * 0.8 + 0.1
        return regression.Choice(1.0, frozen.selection(labels, said_NK), said_NK)

    def surely(notes: int, patients: list[str]) -> bool:
        labels = np.arange(notes) // 10 % 2
        plain = said([n % 10 in (0, 1, 2, 3, 4, 5, 6) for n in range(notes)], labels)
        better = said([n % 10 in (1, 2, 3, 4, 5, 6, 7, 8) for n in range(notes)], labels)
        assert better.score - plain.score > 10 * frozen.TIE
        return frozen._surely(better, plain, labels, patients, 1)

    assert surely(400, [f"p{n}" for n in range(400)])
    assert not surely(20, [f"p{n}" for n in range(20)])
    assert not surely(400, [f"p{n % 20}" for n in range(400)])  # notes of a patient are one chance, not twenty


def test_a_gain_no_larger_than_a_tie_does_not_count_however_sure() -> None:
    labels = np.arange(4000) % 2
    sure = np.where(np.arange(4000) < 4, 1 - labels, labels)  # two thousandths less
    one, other = (regression.Choice(1.0, frozen.selection(labels, p), p) for p in (np.eye(2)[labels], np.eye(2)[sure]))
    assert 0 < one.score - other.score < frozen.TIE
    assert not frozen._surely(one, other, labels, [f"p{n}" for n in range(4000)], 1)


def test_of_a_whole_note_there_are_fewer_topics_than_beside_a_mention() -> None:
    random = np.random.default_rng(5)
    words = [f"word{n}" for n in range(400)]
    texts = [" ".join(random.choice(words, 40)) for _ in range(350)]
    for mentions, count in (((), 150), (((140, 145),), 300)):
        examples = [Example(str(n), f"p{n}", text, 0, mentions) for n, text in enumerate(texts)]
        arrays = frozen._learn_blocks(FrozenConfig(features=("topics",)), examples, np.zeros((350, 0)), [], 0.0, 1)
        assert len(arrays["topic0_axes"]) == count
