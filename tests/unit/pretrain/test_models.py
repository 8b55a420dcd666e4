"""Contracts that every model of MODELS must keep, and AWD-LSTM against the paper's equations cell by cell."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from pretrain.models import MODELS
from pretrain.models.awd_lstm import AwdLstm, AwdLstmConfig
from pretrain.models.dropout import Masks

VOCAB = 37
SMALL = {
    "awd-lstm": {"embedding": 32, "hidden": 48, "layers": 2},
    "transformer-xl": {"width": 32, "layers": 2, "heads": 2, "head_width": 16, "inner": 64, "memory": 24},
}

# Without dropouts that differ from position to position: a text's masks then are those of its parts.
STEADY = {"awd-lstm": {}, "transformer-xl": {"drop": 0.0}}


def build(name: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    kind = MODELS[name]
    return kind(kind.Config(**(SMALL[name] | changes)), VOCAB)


def tokens(lanes: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (lanes, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
class TestContract:
    def test_the_future_cannot_change_the_past(self, name: str) -> None:
        model = build(name).eval()
        before, after = tokens(3, 20), tokens(3, 20)
        after[:, 11:] = (after[:, 11:] + 1) % VOCAB
        a = model(before, model.initial_carry(3), None)[0].output_BTE
        b = model(after, model.initial_carry(3), None)[0].output_BTE
        assert torch.equal(a[:, :11], b[:, :11])
        assert not torch.equal(a[:, 11:], b[:, 11:])

    def test_twice_t_with_carry_is_2t_at_once(self, name: str) -> None:
        model = build(name).double().eval()
        text = tokens(3, 24)
        carry = {key: value.double() for key, value in model.initial_carry(3).items()}
        whole, _ = model(text, carry, None)
        first, carry = model(text[:, :12], carry, None)
        second, _ = model(text[:, 12:], carry, None)
        torch.testing.assert_close(
            torch.cat([first.output_BTE, second.output_BTE], 1), whole.output_BTE, rtol=1e-12, atol=1e-12
        )

    def test_carry_is_by_lane_and_detached(self, name: str) -> None:
        model = build(name)
        _, carry = model(tokens(5, 7), model.initial_carry(5), Masks(1, 1, range(5), torch.device("cpu")))
        assert carry.keys() == model.initial_carry(5).keys()
        assert all(len(value) == 5 and not value.requires_grad for value in carry.values())

    def test_lanes_do_not_touch_each_other(self, name: str) -> None:
        model = build(name)
        text, cpu = tokens(4, 9), torch.device("cpu")
        together = model(text, model.initial_carry(4), Masks(1, 3, range(4), cpu))[0].output_BTE
        apart = model(text[2:], model.initial_carry(2), Masks(1, 3, range(2, 4), cpu))[0].output_BTE
        torch.testing.assert_close(together[2:], apart, rtol=1e-5, atol=1e-6)

    def test_a_start_forgets_all_that_was_read_before(self, name: str) -> None:
        """Output and carry after starts are those of texts that begin there, with the same masks; gradients too."""
        model, cpu = build(name, **STEADY[name]).double(), torch.device("cpu")
        text = tokens(3, 12)
        starts = torch.zeros(3, 12, dtype=torch.bool)
        starts[0, 5] = starts[0, 6] = starts[1, 0] = starts[2, 11] = True
        _, carry = model(tokens(3, 12, 1), {k: v.double() for k, v in model.initial_carry(3).items()}, None)
        masks = Masks(1, 3, range(3), cpu)
        hidden, after = model(text, carry, masks, starts)
        for lane, first, last in [(0, 0, 5), (0, 5, 6), (0, 6, 12), (1, 0, 12), (2, 0, 11), (2, 11, 12)]:
            fresh = bool(starts[lane, first])
            before = {k: v[lane : lane + 1] * (0.0 if fresh else 1.0) for k, v in carry.items()}
            rows = slice(lane, lane + 1)
            alone, left = model(text[rows, first:last], before, masks.rows(rows))
            torch.testing.assert_close(hidden.output_BTE[rows, first:last], alone.output_BTE, rtol=1e-10, atol=1e-12)
            if last == 12:
                for key in after:
                    torch.testing.assert_close(after[key][rows], left[key], rtol=1e-10, atol=1e-12)
        whole = torch.autograd.grad(hidden.output_BTE.square().sum(), list(model.parameters()), allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in whole)
        unmarked = model(text, carry, masks, torch.zeros_like(starts))[0].output_BTE
        torch.testing.assert_close(unmarked, model(text, carry, masks)[0].output_BTE)

    def test_gradients_come_in_one_order_wherever_texts_begin(self, name: str) -> None:
        """ZeRO-2 sums gradients over workers in the order in which they come, and every worker has other texts."""
        model, orders = build(name), []
        for parameter_name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=parameter_name: orders[-1].append(name))
        starts = torch.zeros(6, 3, 12, dtype=torch.bool)
        starts[1, 1, 0] = starts[2, 1, 5] = starts[3, :, 6] = starts[4, 0, 1:] = starts[5, :2, 3] = True
        for step in range(6):
            orders.append([])
            masks = Masks(1, step, range(3), torch.device("cpu"))
            hidden, _ = model(tokens(3, 12, step), model.initial_carry(3), masks, starts[step])
            (model.logits(hidden.output_BTE).logsumexp(-1).sum() + model.penalty(hidden)).backward()
        assert len(orders[0]) == len(list(model.parameters()))
        assert all(order == orders[0] for order in orders)

    def test_overfits_one_batch(self, name: str) -> None:
        model = build(name)
        text = tokens(2, 12)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        for _ in range(400):
            hidden, _ = model(text[:, :-1], model.initial_carry(2), None)
            loss = functional.cross_entropy(model.logits(hidden.output_BTE).flatten(0, 1), text[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.05

    def test_layer_groups_hold_every_parameter_once(self, name: str) -> None:
        model = build(name)
        grouped = [id(parameter) for group in model.layer_groups() for parameter in group]
        assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())

    def test_dropout_changes_training_and_only_training(self, name: str) -> None:
        model = build(name)
        text, cpu = tokens(2, 9), torch.device("cpu")
        run = [model(text, model.initial_carry(2), Masks(1, step, range(2), cpu))[0].output_BTE for step in (1, 1, 2)]
        assert torch.equal(run[0], run[1])
        assert not torch.equal(run[0], run[2])


def by_hand(model: AwdLstm, text_BT: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
    """Equations of arXiv:1708.02182 written out, one cell at a time, with the same masks."""
    config = model.config

    def dropped(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return x if mask is None else x * mask.double()

    rows = masks.shared("embedding", config.drop_embedding, (VOCAB, 1))
    x = dropped(model.embedding.weight, rows)[text_BT]
    x = dropped(x, masks.per_lane("input", config.drop_input, config.embedding))
    for index, layer in enumerate(model.layers):
        if index:
            x = dropped(x, masks.per_lane(f"hidden{index}", config.drop_hidden, x.shape[-1]))
        recurrent = dropped(
            layer.weight_hh, masks.shared(f"weight{index}", config.drop_weight, tuple(layer.weight_hh.shape))
        )
        h = c = torch.zeros(len(text_BT), layer.width, dtype=torch.float64)
        outputs = []
        for t in range(text_BT.shape[1]):
            gates = x[:, t] @ layer.weight_ih.T + layer.bias_ih + h @ recurrent.T + layer.bias_hh
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        x = torch.stack(outputs, 1)
    output = dropped(x, masks.per_lane("output", config.drop_output, config.embedding))
    penalty = config.alpha * (output**2).mean() + config.beta * ((x[:, 1:] - x[:, :-1]) ** 2).mean()
    return output @ model.embedding.weight.T + model.bias, penalty


def test_awd_lstm_is_the_paper_to_the_last_digits() -> None:
    torch.manual_seed(0)
    config = AwdLstmConfig(
        embedding=6,
        hidden=8,
        layers=3,
        drop_embedding=0.2,
        drop_input=0.3,
        drop_hidden=0.3,
        drop_output=0.3,
        drop_weight=0.4,
    )
    model = AwdLstm(config, VOCAB).double()
    text = tokens(3, 10)
    carry = {key: value.double() for key, value in model.initial_carry(3).items()}

    masks = Masks(1, 5, range(3), torch.device("cpu"))
    hidden, _ = model(text, carry, masks)
    ours = functional.cross_entropy(model.logits(hidden.output_BTE).flatten(0, 1), text.flatten())
    ours = ours + model.penalty(hidden)
    logits, penalty = by_hand(model, text, masks)
    reference = functional.cross_entropy(logits.flatten(0, 1), text.flatten()) + penalty
    torch.testing.assert_close(model.logits(hidden.output_BTE), logits, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-14)
    gradients = torch.autograd.grad(ours, list(model.parameters()))
    expected = torch.autograd.grad(reference, list(model.parameters()))
    for name, a, b in zip(dict(model.named_parameters()), gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize(
    "key", ["drop_embedding", "drop_input", "drop_hidden", "drop_output", "drop_weight", "alpha", "beta"]
)
def test_each_of_the_seven_regularizers_matters(key: str) -> None:
    text, masks = tokens(2, 9), Masks(1, 1, range(2), torch.device("cpu"))

    def objective(**changes: float) -> float:
        strong = {f"drop_{part}": 0.4 for part in ("embedding", "input", "hidden", "output", "weight")}
        model = build("awd-lstm", **(strong | changes))
        hidden, _ = model(text, model.initial_carry(2), masks)
        return (model.logits(hidden.output_BTE).square().mean() + model.penalty(hidden)).item()

    assert objective() != objective(**{key: 0.0})
