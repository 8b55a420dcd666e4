"""The classifier reads any length, ignores padding, and unfreezes from the top."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cluster.errors import TrainingError
from downstream.classifier import HeadConfig, NoteClassifier, batches, padded
from downstream.metrics import selection
from downstream.reading import Note
from downstream.unfreezing import (
    Labelled,
    StagesConfig,
    class_weights,
    fine_tune,
    one_cycle,
    probabilities,
    read_states,
    slanted_triangle,
    stages_of,
)
from pretrain.models.awd_lstm import AwdLstm, AwdLstmConfig

CPU = torch.device("cpu")
VOCABULARY = 30
QUIET = lambda tokens, note: None  # noqa: E731


def classifier(segment_tokens: int = 4, bptt_segments: int = 2, classes: int = 2) -> NoteClassifier:
    torch.manual_seed(0)
    encoder = AwdLstm(AwdLstmConfig(embedding=6, hidden=8, layers=2), VOCABULARY)
    head = HeadConfig(detectors=5, segment_tokens=segment_tokens, bptt_segments=bptt_segments)
    built = NoteClassifier(encoder, classes, head)
    torch.nn.init.normal_(built.output.weight)
    return built


def some_notes(count: int = 12, seed: int = 0) -> list[Note]:
    generator = np.random.default_rng(seed)
    return [
        Note(generator.integers(VOCABULARY, size=length).astype(np.uint16))
        for length in generator.integers(1, 20, count)
    ]


def test_note_in_segments_is_the_note_at_once() -> None:
    batch = padded(some_notes(), CPU)
    by_segment, at_once = classifier(segment_tokens=4), classifier(segment_tokens=100)
    assert torch.allclose(by_segment(batch, None), at_once(batch, None), atol=1e-6)


@pytest.mark.parametrize("padding_token", [0, 7])
def test_pooling_ignores_padding(padding_token: int) -> None:
    model = classifier()
    notes = some_notes()
    batch = padded(notes, CPU)
    wider_BT = torch.full((len(notes), 40), padding_token)
    for row, note in zip(wider_BT, notes, strict=True):
        row[: len(note.tokens)] = torch.from_numpy(note.tokens.astype(np.int64))
    real_BT = torch.arange(40) < batch.lengths_B.unsqueeze(1)
    wider = batch._replace(tokens_BT=wider_BT, pooled_BT=real_BT, mention_BT=torch.zeros_like(real_BT))
    together_BK = model(wider, None)
    assert torch.allclose(model(batch, None), together_BK, atol=1e-6)
    for note, logits_K in zip(notes, together_BK, strict=True):
        assert torch.allclose(model(padded([note], CPU), None)[0], logits_K, atol=1e-6)


def test_pools_are_last_max_and_mean() -> None:
    model = classifier()
    states_BTE = torch.randn(1, 9, 6)
    detectors_TD = torch.tanh(model.detectors(model.norm(states_BTE)))[0, :7]
    expected_P = torch.cat([detectors_TD[-1], detectors_TD.amax(0), detectors_TD.mean(0)])
    batch = padded([Note(np.zeros(7, np.uint16))], CPU)
    wide = torch.nn.functional.pad(batch.pooled_BT, (0, 2))
    batch = batch._replace(tokens_BT=torch.zeros(1, 9, dtype=torch.long), pooled_BT=wide)
    logits_BK = model.score(states_BTE.split(4, dim=1), batch, None).logits_BK
    assert torch.allclose(logits_BK[0], model.output(expected_P), atol=1e-6)


def test_gradients_flow_through_the_last_segments_only() -> None:
    note = Note(np.arange(16, dtype=np.uint16))
    model = classifier(segment_tokens=4, bptt_segments=2)
    model(padded([note], CPU), None).sum().backward()
    gradient_VE = model.get_submodule("encoder.embedding").weight.grad
    assert torch.count_nonzero(gradient_VE[:8]) == 0
    assert torch.all(gradient_VE[8:16].abs().sum(1) > 0)


def test_batches_hold_every_note_once_and_derive_from_the_seed() -> None:
    lengths = [len(note.tokens) for note in some_notes(50)]
    parts = batches(lengths, 8, np.random.default_rng([1, 2]))
    assert sorted(np.concatenate(parts)) == list(range(50))
    assert max(map(len, parts)) <= 8
    again = batches(lengths, 8, np.random.default_rng([1, 2]))
    other = batches(lengths, 8, np.random.default_rng([1, 3]))
    assert [p.tolist() for p in parts] == [p.tolist() for p in again] != [p.tolist() for p in other]


def test_slanted_triangle_is_that_of_ulmfit() -> None:
    shares = [slanted_triangle(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 32)
    assert max(shares) == shares[10] == 1
    assert shares[99] == pytest.approx(1 / 32, abs=0.02)


def data(model: NoteClassifier, seed: int, keep: bool = True) -> Labelled:
    """Notes that are positive where token 3 occurs."""
    notes = some_notes(24, seed)
    labels = np.array([int(3 in note.tokens) for note in notes])
    return Labelled(notes, labels, read_states(model, notes, StagesConfig(), QUIET) if keep else None)


def trained(stages: StagesConfig, keep: bool = True) -> tuple[NoteClassifier, dict[str, torch.Tensor]]:
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    fine_tune(model, data(model, 0, keep), data(model, 1, keep), stages, 1, QUIET)
    return model, before


@pytest.mark.parametrize(
    ("top", "moving"), [(0, ()), (1, ("encoder.layers.1",))], ids=["head alone", "head and top layer"]
)
def test_frozen_groups_stay_bit_identical(top: int, moving: tuple[str, ...]) -> None:
    # The weights after the last epoch, not those of the best one, show what has moved.
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    seen: list[dict[str, torch.Tensor]] = []
    stages = StagesConfig(epochs_head=2, epochs_top=top, epochs_all=0, batch=8)

    def watch(tokens: int, note: str) -> None:
        if note:
            seen.append(copy.deepcopy(model.state_dict()))

    fine_tune(model, data(model, 0), data(model, 1), stages, 1, watch)
    for name, value in seen[-1].items():
        learns = not name.startswith("encoder.") or name.startswith(moving or ("nothing",))
        assert torch.equal(value, before[name]) is not learns, name


def test_kept_states_change_nothing() -> None:
    stages = StagesConfig(epochs_head=3, epochs_top=1, epochs_all=1, batch=8)
    with_states, _ = trained(stages, keep=True)
    without, _ = trained(stages, keep=False)
    for name, value in with_states.state_dict().items():
        assert torch.allclose(value, without.state_dict()[name], atol=1e-5), name


def test_best_stage_is_what_remains() -> None:
    model = classifier()
    valid = data(model, 1)
    stages = StagesConfig(epochs_head=4, epochs_top=1, epochs_all=2, lr=0.5, batch=8)  # late stages do harm
    history = fine_tune(model, data(model, 0), valid, stages, 1, QUIET)
    scored = probabilities(model, valid._replace(states=None), False, stages, QUIET)
    ends = [history[3], history[4], history[6]]
    assert [one.kept for one in history].count(True) == 1
    assert selection(valid.labels, scored) == pytest.approx(max(one.validation for one in ends))


def test_loss_that_is_not_finite_stops_before_the_step() -> None:
    model = classifier()
    torch.nn.init.constant_(model.output.bias, float("nan"))
    with pytest.raises(TrainingError, match="stage head, epoch 1: loss not finite"):
        fine_tune(model, data(model, 0), data(model, 1), StagesConfig(), 1, QUIET)


def test_class_weights_balance() -> None:
    labels = np.array([0, 0, 0, 1])
    assert (class_weights(labels, 2)[labels][labels == 0].sum() == class_weights(labels, 2)[1]).item()


def asked(head: HeadConfig) -> NoteClassifier:
    torch.manual_seed(0)
    return NoteClassifier(AwdLstm(AwdLstmConfig(embedding=6, hidden=8, layers=2), VOCABULARY), 2, head)


ATTENTION = HeadConfig(detectors=5, pooling=("attention", "max", "mean", "last"), keys=4, segment_tokens=4)


def told(tokens: list[int], mention: tuple[int, int], near: tuple[int, int], query: list[int]) -> Note:
    return Note(np.array(tokens, np.uint16), (mention,), (near,), np.array(query, np.uint16))


def test_what_is_far_from_a_mention_does_not_count() -> None:
    """What stands behind the window changes nothing; what stands in it does; and attention sums to 1 inside."""
    model = asked(ATTENTION)
    torch.nn.init.normal_(model.output.weight)
    one = told([1, 2, 3, 4, 5, 6, 7, 8, 9], (3, 4), (1, 6), [3, 4])
    batch = padded([one], CPU)
    far, near = one.tokens.copy(), one.tokens.copy()
    far[7], near[5] = 20, 20
    logits_K = model(batch, None)[0]
    assert torch.allclose(model(padded([one._replace(tokens=far)], CPU), None)[0], logits_K, atol=1e-6)
    assert not torch.allclose(model(padded([one._replace(tokens=near)], CPU), None)[0], logits_K, atol=1e-4)
    weight_T = model.attention(batch)[0]
    assert weight_T.sum().item() == pytest.approx(1)
    assert torch.count_nonzero(weight_T[[0, 6, 7, 8]]) == 0


def test_the_question_steers_the_attention() -> None:
    model = asked(ATTENTION)
    one, other = (told([1, 2, 3, 4, 5, 6], (2, 3), (0, 6), query) for query in ([3, 4], [9, 10, 11]))
    together_BT = model.attention(padded([one, other], CPU))
    assert not torch.allclose(together_BT[0], together_BT[1], atol=1e-4)
    assert torch.allclose(model.attention(padded([other], CPU))[0], together_BT[1], atol=1e-6)


def test_attention_learns_to_look_at_mentions() -> None:
    """The auxiliary loss draws it there; without it, it stays where it was."""
    notes = [told(list(range(12)), (5, 6), (0, 12), [3])] * 24  # all alike: the labels teach no place
    labels = np.array([n % 2 for n in range(24)])
    stages = StagesConfig(epochs_head=60, epochs_top=0, epochs_all=0, lr_head=0.1, batch=8)
    share = {}
    for look in (0.0, 2.0):
        model = asked(ATTENTION.model_copy(update={"look": look}))
        torch.nn.init.zeros_(model.at_mention)
        before = model.attention(padded(notes, CPU))[:, 5].mean().item()
        known = Labelled(notes, labels, read_states(model, notes, stages, QUIET))
        fine_tune(model, known, known, stages, 1, QUIET)
        share[look] = model.eval().attention(padded(notes, CPU))[:, 5].mean().item()
    assert before < 0.2
    assert share[2.0] > 0.8 > 0.4 > share[0.0]


def test_gradual_unfreezing_goes_down_layer_by_layer() -> None:
    groups = 5  # embedding, three layers, head
    all_stages = stages_of(StagesConfig(gradual=True, epochs_top=1), groups)
    assert [(name, depth) for name, depth, _, _ in all_stages] == [
        ("head", 1), ("top", 2), ("top 2", 3), ("top 3", 4), ("all", 5),
    ]  # fmt: skip
    assert [name for name, *_ in stages_of(StagesConfig(epochs_top=0), groups)] == ["head", "all"]


def test_one_cycle_rises_and_falls_to_almost_nothing() -> None:
    shares = [one_cycle(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 25)
    assert max(shares) == shares[30] == 1
    assert 0 < shares[99] < 0.01


def test_patience_ends_training_after_stages_without_gain() -> None:
    model = classifier()
    stages = StagesConfig(epochs_head=4, epochs_top=1, epochs_all=2, lr=1e-12, batch=8, gradual=True, patience=1)
    history = fine_tune(model, data(model, 0), data(model, 1), stages, 1, QUIET)
    assert [one.stage for one in history] == ["head"] * 4 + ["top"]  # which changes nothing, so it gains nothing


def test_several_labels_are_learned_each_for_itself() -> None:
    """Tokens 3 and 4 are the labels; a note may have both."""
    torch.manual_seed(0)
    encoder = AwdLstm(AwdLstmConfig(embedding=24, hidden=24, layers=1), VOCABULARY)
    torch.nn.init.normal_(encoder.embedding.weight)
    model = NoteClassifier(encoder, 2, HeadConfig(detectors=16, pooling=("max",), dropout=0.0))
    notes = some_notes(40)
    labels = np.array([[int(3 in note.tokens), int(4 in note.tokens)] for note in notes])
    known = Labelled(notes, labels, None)
    stages = StagesConfig(epochs_head=20, epochs_top=0, epochs_all=30, lr=2e-2, batch=8, weight_decay=0.01)
    fine_tune(model, known, known, stages, 1, QUIET)
    said = probabilities(model, known, False, stages, QUIET)
    assert selection(labels, said) > 0.9
    assert not np.allclose(said.sum(1), 1)
    positives = labels.sum(0)
    assert torch.allclose(class_weights(labels, 2), torch.tensor((40 - positives) / positives).float())
