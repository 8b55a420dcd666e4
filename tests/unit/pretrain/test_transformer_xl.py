"""Transformer-XL against a direct reading of the paper's equations (arXiv:1901.02860 §3.2, §3.3), and its options."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from cluster import config
from cluster.errors import ConfigError
from pretrain import heads
from pretrain.models import attention
from pretrain.models.dropout import Masks, dropped, relu_dropped
from pretrain.models.output import logits
from pretrain.models.transformer_xl import TransformerXl, TransformerXlConfig
from pretrain.streams import IGNORED

VOCAB = 37
CPU = torch.device("cpu")


def build(**changes: Any) -> TransformerXl:
    torch.manual_seed(1)
    small = {"width": 12, "layers": 2, "heads": 3, "head_width": 6, "inner": 16, "memory": 7, "init_std": 0.5}
    model = TransformerXl(TransformerXlConfig(**(small | changes)), VOCAB).double()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    return model


def tokens(lanes: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (lanes, length), generator=torch.Generator().manual_seed(seed))


def read(model: TransformerXl, text_BT: torch.Tensor, segments: list[int], **more: Any) -> torch.Tensor:
    """Outputs of a text that is read in segments."""
    carry, outputs = model.initial_carry(len(text_BT)), []
    for piece in text_BT.split(segments, 1):
        hidden, carry = model(piece, carry, None, **more)
        outputs.append(hidden.output_BTE)
    return torch.cat(outputs, 1)


def wave(distance: int, width: int) -> torch.Tensor:
    """R of one distance: sines, then cosines."""
    rates = [10_000 ** (-2 * i / width) for i in range(width // 2)]
    angles = torch.tensor([distance * rate for rate in rates], dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()])


def by_hand(model: TransformerXl, text: torch.Tensor, read_before: list[torch.Tensor]) -> list[torch.Tensor]:
    """What every layer reads, and the output, of one lane's segment: one query, one head and one key at a time.

    `read_before` is what every layer has read before, and nothing that is not to be seen.
    """
    given = model.config
    width = given.head_width
    x = model.embedding.weights[0][text] * given.width**0.5
    stages = [x]
    for index, layer in enumerate(model.layers):
        before = torch.cat([read_before[index].detach(), x])
        normed = layer.norm_attention(before) if given.norm == "pre" else before
        first = len(before) - len(text)
        queries, keys_values = normed[first:] @ layer.query.T, normed @ layer.key_value.T
        keys, values = keys_values[:, : given.heads * width], keys_values[:, given.heads * width :]
        u = model.content_bias if given.share_biases else layer.content_bias
        v = model.position_bias if given.share_biases else layer.position_bias
        attended = []
        for i in range(len(text)):
            of_heads = []
            for head in range(given.heads):
                part = slice(head * width, (head + 1) * width)
                newest = first + i
                oldest = max(newest - given.memory + 1, 0) if given.same_length else 0
                scores = []
                for j in range(oldest, newest + 1):
                    distance = newest - j if given.clamp is None else min(newest - j, given.clamp)
                    r = (layer.distance @ wave(distance, given.width))[part]
                    q = queries[i, part]
                    scores.append(((q + u[head]) @ keys[j, part] + (q + v[head]) @ r) / width**0.5)
                of_heads.append(torch.stack(scores).softmax(0) @ values[oldest : newest + 1, part])
            attended.append(torch.cat(of_heads))
        x = x + torch.stack(attended) @ layer.out.T
        if given.norm == "post":
            x = layer.norm_attention(x)
            x = layer.norm_feed(x + layer.feed_out(functional.relu(layer.feed_in(x))))
        else:
            x = x + layer.feed_out(functional.relu(layer.feed_in(layer.norm_feed(x))))
        stages.append(x)
    if model.norm is not None:
        stages[-1] = model.norm(x)
    return stages


@pytest.mark.parametrize(("lanes", "length", "memory"), [(1, 1, 7), (2, 5, 7), (3, 6, 3), (2, 4, 0), (1, 9, 16)])
@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "post"},
        {"norm": "pre", "share_biases": False},
        {"clamp": 3, "checkpoint_activations": True},
        {"same_length": True, "layers": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [0, 1 << 21])
def test_it_is_the_paper_to_the_last_digits(
    monkeypatch: pytest.MonkeyPatch, lanes: int, length: int, memory: int, changes: dict[str, Any], chunk: int
) -> None:
    """Outputs of three segments and every gradient of the last, with and without a memory."""
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(attention, "CHUNK_QUERIES", 4)
    if changes.get("same_length") and not memory:
        return
    model = build(memory=memory, **changes)
    carry = model.initial_carry(lanes)
    before = [[torch.zeros(0, 12, dtype=torch.float64)] * len(model.layers) for _ in range(lanes)]
    weights = torch.randn(lanes, length, 12, dtype=torch.float64)
    for segment in range(3):
        text = tokens(lanes, length, segment)
        hidden, carry = model(text, carry, None)
        lanes_by_hand = [by_hand(model, text[lane], before[lane]) for lane in range(lanes)]
        expected = torch.stack([stages[-1] for stages in lanes_by_hand])
        torch.testing.assert_close(hidden.output_BTE, expected, rtol=1e-11, atol=1e-12)
        for lane, stages in enumerate(lanes_by_hand):
            whole = [torch.cat(pair) for pair in zip(before[lane], stages[:-1], strict=True)]
            before[lane] = [seen[len(seen) - min(memory, len(seen)) :] for seen in whole]
    gradients = torch.autograd.grad((hidden.output_BTE * weights).sum(), list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad((expected * weights).sum(), list(model.parameters()), allow_unused=True)
    for name, ours, theirs in zip(dict(model.named_parameters()), gradients, wanted, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)


def some(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("chunk", [1, 40])
@pytest.mark.parametrize(("lanes", "length", "keys"), [(2, 5, 12), (3, 4, 4), (1, 1, 9), (2, 8, 9)])
def test_all_ways_to_attend_are_one(
    monkeypatch: pytest.MonkeyPatch, lanes: int, length: int, keys: int, chunk: int
) -> None:
    """In chunks, with fused attention and a bias, and with all weights at once: outputs and gradients."""
    torch.manual_seed(2)
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(attention, "CHUNK_QUERIES", 3 if chunk == 1 else 128)
    queries, others = some(2, lanes, length, 3, 6), some(2, lanes, keys, 3, 6)
    distances, weights = some(keys, 3, 6), some(lanes, length, 3, 6)
    live = (torch.rand(lanes, keys - length) < 0.7).double()
    starts = torch.rand(lanes, length) < 0.2
    bias = attention.visible(live, starts, length, None)
    zero = torch.zeros(lanes, dtype=torch.int64)
    ways: list[Any] = [
        lambda: attention.relative(*queries, *others, distances, bias),
        lambda: attention.relative(*queries, *others, distances, bias, (zero, 0)),
        lambda: attention.biased(*(queries * 6**-0.5), *others, distances, bias, None),
    ]
    results = []
    for way in ways:
        output = way()
        results.append([output, *torch.autograd.grad((output * weights).sum(), [queries, others, distances])])
    for result in results[1:]:
        for ours, theirs in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_what_is_seen() -> None:
    live = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    starts = torch.tensor([[False, True, False], [False, False, False]])

    def seen(*given: Any) -> Any:
        return attention.visible(*given).exp().int().tolist()

    assert seen(live, starts, 3, None) == [
        [[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]],
        [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]],
    ]
    assert seen(live[:1], None, 3, 2) == [[[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]]


@pytest.mark.parametrize("position", ["relative", "rotary"])
def test_with_same_length_segments_do_not_matter(position: str) -> None:
    model = build(position=position, same_length=True)
    text = tokens(2, 23)
    whole = read(model, text, [23])
    for segments in ([1] * 23, [10, 13], [3, 9, 1, 10]):
        torch.testing.assert_close(read(model, text, segments), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("position", ["relative", "rotary"])
def test_without_it_more_memory_is_more_context(position: str) -> None:
    text = tokens(2, 24)
    short, long = (read(build(position=position, memory=memory), text, [6] * 4) for memory in (6, 18))
    torch.testing.assert_close(short[:, :12], long[:, :12])
    assert not torch.allclose(short[:, 12:], long[:, 12:])


def test_rotary_sees_distances_only() -> None:
    """A full memory, which takes the way of flash attention, is a text at once; and the masked way is the same."""
    model = build(position="rotary", memory=8)
    text = tokens(2, 24)
    nothing = torch.zeros(2, 8, dtype=torch.bool)
    torch.testing.assert_close(read(model, text, [8] * 3), read(model, text, [8] * 3, starts_BT=nothing))
    x = torch.randn(1, 5, 2, 6, dtype=torch.float64)
    near, far = (attention.rotated(x, first) for first in (0, 1000))
    products = [torch.einsum("bihe,bjhe->bhij", turned, turned) for turned in (near, far)]
    torch.testing.assert_close(*products)
    assert not torch.allclose(near, x)


def test_no_patient_sees_another() -> None:
    """With a start between them, nothing of the one text changes a number of the other; nor does the memory."""
    for position in ("relative", "rotary"):
        model = build(position=position)
        starts = torch.zeros(1, 9, dtype=torch.bool)
        starts[0, 4] = True
        outputs = []
        for seed in (1, 2):
            text = torch.cat([tokens(1, 4, seed), tokens(1, 5)], 1)
            _, carry = model(tokens(1, 9, seed + 10), model.initial_carry(1), None)
            hidden, carry = model(text, carry, None, starts)
            outputs.append(torch.cat([hidden.output_BTE[:, 4:], model(tokens(1, 3), carry, None)[0].output_BTE], 1))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("position", ["relative", "rotary"])
def test_each_dropout_matters_and_is_by_element(position: str) -> None:
    text, seen = tokens(2, 9), []
    for changes in ({}, {"drop": 0.0}, {"drop_attention": 0.0}):
        model = build(position=position, **({"drop": 0.3, "drop_attention": 0.3} | changes))
        seen.append(model(text, model.initial_carry(2), Masks(1, 1, range(2), CPU))[0].output_BTE)
    assert not any(torch.equal(seen[0], other) for other in seen[1:])
    x = torch.ones(4, 50, 101, dtype=torch.float64, requires_grad=True)
    masks = Masks(1, 1, range(4), CPU)
    (keys, others), threshold = masks.keys(["a", "b"]), masks.threshold(0.25)
    y = dropped(x, keys, threshold)
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert y.std(1).min() > 0
    assert y.std(2).min() > 0
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())
    assert not torch.equal(y, dropped(x, others, threshold))
    z = torch.randn(4, 50, 101, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(z)
    for ours, theirs in zip(
        *(
            (out, torch.autograd.grad((out * weights).sum(), z)[0])
            for out in (relu_dropped(z * 1.0, keys, threshold), dropped(functional.relu(z), keys, threshold))
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    assert torch.equal(y[2:], dropped(x[2:], masks.rows(slice(2, 4)).keys(["a"])[0], threshold))


def test_numbers_are_those_of_splitmix64() -> None:
    """The first ones of the reference implementation (https://prng.di.unimi.it/splitmix64.c) from seed 1234567."""
    from pretrain.models.dropout import _splitmix

    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = _splitmix(torch.tensor([1234567]), 4)[0].tolist()
    assert [number % 2**64 for number in found] == expected


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_computing_again_in_the_backward_changes_nothing(norm: str) -> None:
    text, gradients = tokens(2, 9), []
    for again in (False, True):
        model = build(norm=norm, checkpoint_activations=again, drop_attention=0.2)
        hidden, _ = model(text, model.initial_carry(2), Masks(1, 1, range(2), CPU))
        model.logits(hidden.output_BTE).logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for once, twice in zip(*gradients, strict=True):
        assert torch.equal(once, twice)


class TestAdaptive:
    @pytest.mark.parametrize("div_val", [1, 2])
    def test_it_is_a_distribution_whose_loss_every_head_finds(self, div_val: int) -> None:
        model = build(cutoffs=[10, 25], div_val=div_val)
        output = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
        targets = torch.tensor([0, 9, 10, 24, 25, 36, IGNORED, 3])
        scores = logits(output, model.softmax())
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(8, dtype=torch.float64))
        expected = -scores[targets >= 0].gather(1, targets[targets >= 0, None]).sum()
        nll, hits = heads.score(output, model.softmax(), targets)
        torch.testing.assert_close(nll.sum(), expected)
        assert nll[6] == 0
        assert hits.tolist() == (scores.argmax(1) == targets).tolist()
        # The projection of the first level's embedding is the only one that the softmax has not.
        parts = [part for name, part in model.embedding.named_parameters() if name != "projections.0"]
        wanted = torch.autograd.grad(expected, [output, *parts])
        for name in ("dense", "chunked"):
            nll = heads.nll(heads.HEADS[name], output, model.softmax(), targets)
            torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-6)
            if name == "chunked":  # dense computes in fp32
                for ours, theirs in zip(torch.autograd.grad(nll, [output, *parts]), wanted, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)

    def test_embeddings_narrow_and_are_tied(self) -> None:
        model = build(cutoffs=[10, 25], div_val=2)
        embedding = model.embedding
        assert [tuple(weight.shape) for weight in embedding.weights] == [(10, 12), (15, 6), (12, 3)]
        text = torch.tensor([[0, 9, 10, 24, 25, 36]])
        vectors = embedding(text)[0] / 12**0.5
        for place, (level, row) in enumerate([(0, 0), (0, 9), (1, 0), (1, 14), (2, 0), (2, 11)]):
            torch.testing.assert_close(vectors[place], embedding.projections[level] @ embedding.weights[level][row])
        levels = model.softmax()
        assert levels[1].weight_VE is embedding.weights[1]
        assert len(levels[0].weight_VE) == 12
        assert model.BY_TOKEN == ()
        assert build().BY_TOKEN == ("embedding.weights.0", "embedding.bias.0")

    def test_it_learns(self) -> None:
        torch.manual_seed(0)
        model = build(cutoffs=[10, 25], div_val=2, init_std=0.2).float()
        text = tokens(2, 12)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(150):
            hidden, _ = model(text[:, :-1], model.initial_carry(2), None)
            output = hidden.output_BTE.flatten(0, 1)
            loss = heads.nll(heads.chunked, output, model.softmax(), text[:, 1:].flatten()) / 22
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"position": "rotary", "head_width": 41}, "even head_width"),
        ({"position": "rotary", "clamp": 5}, "no clamp"),
        ({"width": 13}, "width must be even"),
        ({"memory": 0, "same_length": True}, "memory is 0"),
        ({"cutoffs": [20, 10]}, "cutoffs must be positive and rise"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.validate(TransformerXlConfig, changes, "model")


def test_presets_have_the_published_sizes() -> None:
    """Parameters with WikiText-103's words, as the code of kimiyoung/transformer-xl counts them by the settings of its
    run_wt103_*.sh, and for NVIDIA's as it says, in millions.
    """

    def parameters(**given: Any) -> int:
        with torch.device("meta"):
            model = TransformerXl(TransformerXlConfig(cutoffs=[20_000, 40_000, 200_000], **given), 267_735)
        return sum(parameter.numel() for parameter in model.parameters())

    assert parameters(preset="xl-base") == 151_107_538
    assert parameters(preset="xl-large", div_val=4) == 285_170_506
    assert round(parameters(preset="xl-base-192m") / 1e6) == 192


@pytest.mark.slow
def test_compiled_layers_are_the_layers() -> None:
    text, results = tokens(2, 9), []
    for compiled in (False, True):
        model = build(compile=compiled)
        carry = model.initial_carry(2)
        for _ in range(2):
            hidden, carry = model(text, carry, Masks(1, 1, range(2), CPU))
        results.append([hidden.output_BTE, *torch.autograd.grad(hidden.output_BTE.sum(), [model.layers[0].query])])
    for plain, compiled_one in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled_one, rtol=1e-9, atol=1e-11)
