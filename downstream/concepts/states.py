"""What a language model makes of mentions: it reads a note once, with its memory, and its states beside each are kept.

    … denies [ chest pain ] or …      its last, its mean, before it │ mean of 16 and 64 before │ mean of 16 and 64 after

One that reads backwards adds the same from the other end: it has seen "was ruled out" when it comes to the mention.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from cluster.logs import Advance
from downstream.classifier import Encoder
from downstream.metrics import Floats
from downstream.reading import Tokens, words_of
from pretrain.run import Trained
from sharding.clean import cleaned_around

SEGMENT = 128  # tokens read at a time, with the carry of those before; of more, attention is dearer and tells no more
WIDTHS = (16, 64)  # tokens on either side over which states are averaged
TOGETHER = 16  # passages read at a time

Places = list[tuple[int, int]]


class States:
    """Language models that read notes: one forwards, and one backwards if there is one."""

    def __init__(self, models: Sequence[Trained]):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.models = [trained.with_model(trained.model.to(device)) for trained in models]
        # At a time, for the operations of one are too small to be worth several cores.
        threads = max(1, torch.get_num_threads() // len(models))
        self._pool = ThreadPoolExecutor(len(models), "states", torch.set_num_threads, (threads,))

    def __call__(self, text: str, spans: Sequence[tuple[int, int]]) -> Floats:
        """[N, P]: for every span of the text (they may overlap) the states of every model, side by side."""
        return np.concatenate(list(self._pool.map(lambda trained: _read(trained, text, spans), self.models)), 1)

    def of_passages(self, texts: Sequence[str], advance: Advance | None = None) -> Floats:
        """[N, 2E·models]: of every text, read alone, the mean and the maximum of the states of every model. `advance`
        hears how many the first model has read.
        """
        heard = [advance, *[None] * (len(self.models) - 1)]
        read = self._pool.map(lambda trained, advance: _pooled(trained, texts, advance), self.models, heard)
        return np.concatenate(list(read), 1)


def _read(trained: Trained, text: str, spans: Sequence[tuple[int, int]]) -> Floats:
    return _states(trained, *tokens_at(trained, text, spans))


@torch.no_grad()
def _pooled(trained: Trained, texts: Sequence[str], advance: Advance | None) -> Floats:
    tokens_N = trained.tokenizer.encode([trained.clean_text(text) for text in texts])
    if trained.backward:
        tokens_N = [tokens[::-1] for tokens in tokens_N]
    encoder: Encoder = trained.model  # type: ignore[assignment]
    device = next(trained.model.parameters()).device
    pooled_N2E = np.zeros((len(texts), 2 * encoder.width))
    lengths_N = [len(tokens) for tokens in tokens_N]
    by_length = sorted((number for number, length in enumerate(lengths_N) if length), key=lengths_N.__getitem__)
    for first in range(0, len(by_length), TOGETHER):
        rows = by_length[first : first + TOGETHER]
        lengths_B1 = torch.tensor([[lengths_N[row]] for row in rows], device=device)
        tokens_BT = torch.zeros((len(rows), int(lengths_B1.max())), dtype=torch.long)
        for place, row in enumerate(rows):
            tokens_BT[place, : lengths_N[row]] = torch.from_numpy(tokens_N[row].astype(np.int64))
        carry = encoder.initial_carry(len(rows))
        total_BE = torch.zeros((len(rows), encoder.width), device=device)
        most_BE = torch.full_like(total_BE, -torch.inf)
        for start, segment_BS in zip(range(0, tokens_BT.shape[1], SEGMENT), tokens_BT.split(SEGMENT, 1), strict=True):
            hidden, carry = encoder(segment_BS.to(device), carry, None)
            places_1S = torch.arange(start, start + segment_BS.shape[1], device=device)[None]
            live_BS1 = (places_1S < lengths_B1)[..., None]  # what stands behind a text's end is not of it
            total_BE += (hidden.raw_BTE * live_BS1).sum(1)
            most_BE = torch.maximum(most_BE, hidden.raw_BTE.masked_fill(~live_BS1, -torch.inf).amax(1))
        pooled_N2E[rows] = torch.cat([total_BE / lengths_B1, most_BE], 1).double().cpu().numpy()
        if advance:
            advance(min(first + TOGETHER, len(by_length)), "")
    return pooled_N2E


def tokens_at(trained: Trained, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Tokens, Places]:
    """A note as the model's own were cleaned, in tokens as the model reads them, and where in them the spans are (at
    least one token each).
    """
    cleaned, places = cleaned_around(text, spans, trained.clean)
    words = words_of(cleaned)
    starts, ends = [start for start, _ in words], [end for _, end in words]
    tokens, first_T = trained.tokenizer.encode_words([cleaned[start:end] for start, end in words])
    found = []
    for start, end in places:
        first = min(bisect.bisect_right(ends, start), len(words) - 1)
        last = max(bisect.bisect_left(starts, end), first + 1)
        found.append((int(first_T[first]), max(int(first_T[last]), int(first_T[first]) + 1)))
    if trained.backward:
        tokens, found = tokens[::-1].copy(), [(len(tokens) - b, len(tokens) - a) for a, b in found]
    return tokens, found


def windows_of(length: int, place: tuple[int, int]) -> Places:
    """The stretches of a note of so many tokens, over each of which the states are averaged for a mention."""
    start, end = place
    windows = [(end - 1, end), (start, end), (max(0, start - 1), max(1, start))]
    windows += [(max(0, start - width), max(1, start)) for width in WIDTHS]
    return windows + [(min(end, length - 1), min(max(end + width, 1), length)) for width in WIDTHS]


@torch.no_grad()
def _states(trained: Trained, tokens: Tokens, places: Places) -> Floats:
    """[N, P]. Sums up to the edges of the windows are all that is kept of a note, however long it is."""
    windows_N = [windows_of(len(tokens), place) for place in places]
    edges = sorted({edge for windows in windows_N for window in windows for edge in window})
    encoder: Encoder = trained.model  # type: ignore[assignment]
    device = next(trained.model.parameters()).device
    carry = encoder.initial_carry(1)
    sums = np.zeros((len(edges), encoder.width))
    total_E = torch.zeros(encoder.width, dtype=torch.float64, device=device)
    done = bisect.bisect_right(edges, 0)
    for start in range(0, edges[-1] if edges else 0, SEGMENT):
        segment = torch.from_numpy(tokens[start : start + SEGMENT].astype(np.int64)).unsqueeze(0)
        hidden, carry = encoder(segment.to(device), carry, None)
        up_to_SE = total_E + hidden.raw_BTE[0].double().cumsum(0)
        total_E = up_to_SE[-1]
        until = bisect.bisect_right(edges, start + segment.shape[1])
        sums[done:until] = up_to_SE[[edge - start - 1 for edge in edges[done:until]]].cpu().numpy()
        done = until
    at = {edge: place for place, edge in enumerate(edges)}
    rows = [[(sums[at[b]] - sums[at[a]]) / (b - a) for a, b in windows] for windows in windows_N]
    return np.array(rows).reshape(len(places), -1)
