"""The quick answer: the language model stays frozen, every note is read once, and logistic regression stands on top.

    states   the model's: their mean and maximum over the note, or, where mentions are known, at, before and beside them
    words    TF-IDF of words and word pairs, or, beside mentions, of the words on either side
    topics   latent semantic analysis of the same (Deerwester et al. 1990), learned from the unlabelled notes as well
    place    how far into the note a mention stands

Each is a block of unit length, so that one regularization fits all; how much the states count is chosen with it, by
cross-validation: beside a mention a small model says more than the words, of a whole note less, and states that gain
no more than chance could have given them count nothing (`_surely`). So is, for whole notes, what the first axes of
topics count beside the others (`_spread`). `features` says which blocks there are, and a run with ["states"] shows what
they are worth.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sparse
import torch
from pydantic import Field
from scipy.linalg import eigh
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from torch import Tensor

from cluster.config import Section
from downstream.classifier import Batch, NoteClassifier, batches, padded
from downstream.metrics import Floats, Ints, patient_draws, selection
from downstream.reading import Note
from downstream.regression import MANY, STRENGTHS, Choice, chosen, cuts_of, probabilities, regress
from downstream.tasks.examples import Example

SCALES = (0.0, 0.3, 1.0, 2.0)  # of the states
TIE = 0.005  # of the score: states that gain no more are left out
DRAWS = 200  # of patients, for the standard error of a gain
TOPICS, TOPICS_BESIDE = 150, 300  # of a whole note, beside a mention
ENOUGH = 2000  # notes, of those with and without labels, to choose the spread of topics by
REPEATS = 3  # of the folds, for fewer than MANY notes
WORDS = 0.3  # how much words count beside the topics of whole notes: of few labels they are most of the noise
SPREADS = (1.0, 0.0, -1.0)  # of topics: every axis alike, as LSA has them, the first above all
BESIDE = (16, 64)  # tokens on each side of a mention over which states are averaged
NEAR, FAR = 15, 60  # words on each side of a mention
STEPS = np.linspace(0, 1, 9)  # of the place in the note
MAX_FEATURES = 100_000


class FrozenConfig(Section):
    """Section [frozen], for mode = "frozen"."""

    features: tuple[Literal["states", "words", "topics", "place"], ...] = Field(
        ("states", "words", "topics", "place"), min_length=1
    )
    topics: int | None = Field(
        None, ge=2, description="of each view; if not given 150 of a whole note, 300 beside a mention"
    )


@torch.no_grad()
def pooled_states(
    reader: NoteClassifier, notes: Sequence[Note], size: int, advance: Callable[[int, str], None]
) -> Floats:
    """[N, P]: of each note the pools of its states by the language model as it is."""
    reader.eval()
    device = next(reader.parameters()).device
    alike: dict[bytes, list[int]] = {}  # a note may be asked about many mentions: it is read once
    for place, note in enumerate(notes):
        alike.setdefault(note.tokens.tobytes(), []).append(place)
    groups = list(alike.values())
    found: list[Floats] = [np.empty(0)] * len(notes)
    for indices in batches([len(notes[group[0]].tokens) for group in groups], size, None):
        batch: Batch = padded([notes[groups[i][0]] for i in indices], device)
        states_BTE = torch.cat(list(reader.states(batch, None)), 1).cpu()
        for i, states_TE in zip(indices, states_BTE, strict=True):
            for place in groups[i]:
                found[place] = _pools(states_TE[: len(notes[place].tokens)], notes[place])
            advance(sum(len(notes[place].tokens) for place in groups[i]), "")
    return np.stack(found)


def _pools(states_TE: Tensor, note: Note) -> Floats:
    if not note.mentions:
        return torch.cat([states_TE.mean(0), states_TE.amax(0)]).double().numpy()
    pools = []
    for start, end in note.mentions:
        beside = [states_TE[max(0, start - width) : max(1, start)].mean(0) for width in BESIDE]
        beside += [states_TE[min(end, len(states_TE) - 1) : end + width].mean(0) for width in BESIDE]
        pools.append(torch.cat([states_TE[end - 1], states_TE[max(0, start - 1)], *beside]))
    return torch.stack(pools).mean(0).double().numpy()


def _words_only(text: str) -> str:
    """Words of two letters and more in lower case: beside a mention punctuation says something, in a whole note it
    parts "pain," from "pain".
    """
    return " ".join(re.findall(r"\w\w+", text.lower()))


def sides(example: Example, width: int) -> tuple[list[str], list[str]]:
    """The `width` words before and after each mention, in lower case."""
    text = example.text.lower()
    before = [word for start, _ in example.mentions for word in text[:start].split()[-width:]]
    after = [word for _, end in example.mentions for word in text[end:].split()[:width]]
    return before, after


def told(example: Example) -> str:
    """What a linear model is told of an example: the note, or each side of its mentions and the mention itself."""
    if not example.mentions:
        return _words_only(example.text)
    before, after = sides(example, NEAR)
    said = [example.text[start:end].lower().replace(" ", "_") for start, end in example.mentions]
    return " ".join(
        [*(f"l_{word}" for word in before), *(f"r_{word}" for word in after), *(f"c_{word}" for word in said)]
    )


def _views(examples: Sequence[Example]) -> list[list[str]]:
    """The texts of which topics are made: the note, or the words before and after mentions, near and far."""
    if not any(example.mentions for example in examples):
        return [[_words_only(example.text) for example in examples]]
    return [[" ".join(sides(example, width)[side]) for example in examples] for width in (NEAR, FAR) for side in (0, 1)]


def place(example: Example) -> Floats:
    """Where the first mention stands: bumps over its share of the note, and over its distance from the beginning."""
    if not example.mentions:
        return np.zeros(2 * len(STEPS))
    start = example.mentions[0][0]
    shares = start / len(example.text), min(start, 4000) / 4000
    return np.concatenate([np.exp(-(((share - STEPS) / 0.12) ** 2)) for share in shares])


class Words(NamedTuple):
    """A fitted TF-IDF: terms with their inverse document frequencies."""

    terms: list[str]
    idf: Floats

    @classmethod
    def fit(cls, texts: Sequence[str], min_df: int) -> Words:
        """Of single words and pairs."""
        found = cls._vectorizer(min_df=min_df, max_features=MAX_FEATURES).fit(texts)
        return cls(found.get_feature_names_out().tolist(), found.idf_)

    @staticmethod
    def _vectorizer(**settings: Any) -> TfidfVectorizer:
        return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S*\w\S*", **settings)

    def __call__(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """[N, terms], rows of unit length."""
        vectorizer = self._vectorizer(vocabulary={term: i for i, term in enumerate(self.terms)})
        vectorizer.idf_ = self.idf
        return vectorizer.transform(texts)


def npz(arrays: Mapping[str, Any]) -> bytes:
    """Arrays by name as one compressed file."""
    written = io.BytesIO()
    np.savez_compressed(written, allow_pickle=False, **arrays)
    return written.getvalue()


class Frozen:
    """Blocks of features and a regression. `arrays` is all of it, as numbers and names."""

    def __init__(self, settings: FrozenConfig, arrays: dict[str, Any]):
        self.settings, self.arrays = settings, arrays

    def save(self) -> bytes:
        """As one file without code in it (no pickle)."""
        stored = {
            key: np.frombuffer(json.dumps(value).encode(), np.uint8) if isinstance(value, list) else value
            for key, value in self.arrays.items()
        }
        return npz(stored)

    @classmethod
    def load(cls, settings: FrozenConfig, content: bytes) -> Frozen:
        """From what `save` gave."""
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {
                key: json.loads(stored[key].tobytes()) if key.endswith("terms") else stored[key] for key in stored.files
            }
        return cls(settings, arrays)

    @property
    def reads(self) -> bool:
        """Whether the states of the language model count."""
        return "states" in self.settings.features and float(self.arrays["scale"]) != 0.0

    def blocks(self, examples: Sequence[Example], states_NP: Floats | None) -> dict[str, sparse.csr_matrix]:
        """The features by kind; without states theirs are zeros."""
        arrays = self.arrays
        found: dict[str, sparse.csr_matrix] = {}
        for kind in self.settings.features:
            if kind == "states" and states_NP is None:
                found[kind] = sparse.csr_matrix((len(examples), len(arrays["mean"])))
            elif kind == "states":
                found[kind] = sparse.csr_matrix(normalize((states_NP - arrays["mean"]) / arrays["deviation"]))
            elif kind == "words":
                words = Words(arrays["terms"], arrays["idf"])([told(example) for example in examples])
                found[kind] = words * float(arrays.get("share", 1.0))  # older classifiers have none
            elif kind == "topics":
                views = _views(examples)
                for view, texts in enumerate(views):
                    words = Words(arrays[f"topic{view}_terms"], arrays[f"topic{view}_idf"])(texts)
                    topics = normalize(words @ arrays[f"topic{view}_axes"].T)
                    found[f"{kind}{view}"] = sparse.csr_matrix(topics / np.sqrt(len(views)))
            elif any(example.mentions for example in examples):
                found[kind] = sparse.csr_matrix(normalize(np.stack([place(example) for example in examples])))
        return found

    def __call__(self, examples: Sequence[Example], states_NP: Floats | None) -> Floats:
        """Probabilities [N, K]; where the model `reads`, the pooled states are asked for."""
        return probabilities(self.arrays, _joined(self.blocks(examples, states_NP), float(self.arrays["scale"])))


def _joined(blocks: Mapping[str, sparse.csr_matrix], scale: float) -> sparse.csr_matrix:
    """Blocks side by side, the states times `scale`."""
    return sparse.hstack([block * (scale if kind == "states" else 1.0) for kind, block in blocks.items()]).tocsr()


def fit(
    settings: FrozenConfig,
    data: Mapping[str, tuple[Sequence[Example], Floats, Ints]],
    unlabelled: Sequence[Example],
    seed: int,
) -> tuple[dict[str, Floats], Frozen, dict[str, float]]:
    """Chooses regularization and scale by cross-validation within `train` and `valid`, and learns from both.

    `data`: by split (examples, pooled states, labels). Returns the probabilities of `train` and `valid` (of each note
    by models that have not seen it) and of `test`, the model, and what was chosen. Where a class is missing in a fold
    there are none of `train`.
    """
    train, valid = data["train"], data["valid"]
    labelled, labels = [*train[0], *valid[0]], np.concatenate([train[2], valid[2]])
    spread, strengths = _spread(settings, labelled, labels, unlabelled, seed)
    arrays = _learn_blocks(settings, labelled, np.concatenate([train[1], valid[1]]), unlabelled, spread, seed)
    blocks = {name: Frozen(settings, arrays).blocks(examples, states) for name, (examples, states, _) in data.items()}
    both = {kind: sparse.vstack([blocks["train"][kind], blocks["valid"][kind]]) for kind in blocks["train"]}
    patients = [example.patient_id for example in labelled]
    scales = SCALES if "states" in settings.features and len(both) > 1 else (1.0,)
    tried = {scale: chosen(_joined(both, scale), labels, patients, strengths, seed) for scale in scales}
    scale = max(tried, key=lambda one: tried[one].score)
    if 0.0 in tried and not _surely(tried[scale], tried[0.0], labels, patients, seed):
        scale = 0.0
    strength, _, said_NK = tried[scale]
    features = {name: _joined(found, scale) for name, found in blocks.items()}
    model = Frozen(settings, {**arrays, "scale": np.array(scale), **regress(_joined(both, scale), labels, strength)})
    found = {"test": probabilities(model.arrays, features["test"])}
    if said_NK is None:
        found["valid"] = probabilities(regress(features["train"], train[2], strength), features["valid"])
    else:
        found |= {"train": said_NK[: len(train[2])], "valid": said_NK[len(train[2]) :]}
    return found, model, {"strength": strength, "scale": scale, "spread": spread}


def _surely(better: Choice, plain: Choice, labels: Ints, patients: Sequence[str], seed: int) -> bool:
    """Whether the gain of `better` is above TIE and its own standard error over draws of patients (the rule of one
    standard error, Breiman et al. 1984, on the paired difference): the best of several scales is the luckiest one too,
    and of a few hundred labels luck is most of what it has.
    """
    gain, error = better.score - plain.score, 0.0
    if better.said_NK is not None and plain.said_NK is not None:
        error = float(
            np.nanstd(
                [
                    selection(labels, better.said_NK, weights_N) - selection(labels, plain.said_NK, weights_N)
                    for weights_N in patient_draws(patients, DRAWS, seed)
                ]
            )
        )
    return gain > max(TIE, error)


def _spread(
    settings: FrozenConfig, labelled: Sequence[Example], labels: Ints, unlabelled: Sequence[Example], seed: int
) -> tuple[float, Sequence[float]]:
    """How topics of whole notes are spread, and the C to go with it: those with the best score, with words, of
    predictions out of folds. Kinds of operations are told apart by axes that few notes have, how a patient will fare by
    the first few. Topics are learned anew for every fold, without its notes: seen from inside, axes of few notes are
    those notes.
    """
    if "topics" not in settings.features or any(example.mentions for example in labelled):
        return 0.0, STRENGTHS
    drawn = np.random.default_rng(seed)
    kept = np.sort(drawn.permutation(len(labelled))[:ENOUGH])
    others = [unlabelled[i] for i in np.sort(drawn.permutation(len(unlabelled))[:ENOUGH])]
    labels, notes = labels[kept], [labelled[i] for i in kept]
    texts = _views([*notes, *others])[0]
    terms_NW = Words.fit(texts, 2)(texts)
    products_NN = (terms_NW @ terms_NW.T).toarray()
    patients = np.array([example.patient_id for example in (*notes, *others)])
    words_NW = [WORDS * Words.fit(texts[: len(notes)], 2)(texts[: len(notes)])] if "words" in settings.features else []
    said: dict[tuple[float, float], list[Floats]] = {(spread, c): [] for spread in SPREADS for c in STRENGTHS}
    # Of a few hundred labels one cut is a bad guide.
    repeats = range(REPEATS if len(labels) < MANY else 1)
    cuts = [cut for repeat in repeats for cut in cuts_of(labels, patients[: len(notes)].tolist(), seed + repeat)]
    for learned, left in cuts:
        inside = np.flatnonzero(~np.isin(patients, patients[left]))
        axes = min(settings.topics or TOPICS, len(inside) - 1)
        # The axes themselves are not needed: notes are told by their products with those that axes are sums of.
        values_T, vectors_NT = eigh(
            products_NN[np.ix_(inside, inside)], subset_by_index=(len(inside) - axes, len(inside) - 1)
        )
        found_T = np.sqrt(np.maximum(values_T, 1e-12))
        topics_NT = products_NN[: len(notes), inside] @ vectors_NT / found_T
        for spread in SPREADS:
            rows = sparse.hstack([*words_NW, sparse.csr_matrix(normalize(topics_NT / found_T**spread))]).tocsr()
            for c in STRENGTHS:
                said[spread, c].append(probabilities(regress(rows[learned], labels[learned], c), rows[left]))
    if any(len({one.shape[1] for one in some}) > 1 for some in said.values()):
        return 0.0, STRENGTHS  # a class is missing in a fold: too few notes to choose
    truth = labels[np.concatenate([left for _, left in cuts])]
    spread, strength = max(said, key=lambda key: selection(truth, np.concatenate(said[key])))
    # The best C depends on how many notes there are; of many, inside and outside look alike.
    return spread, (strength,) if len(notes) == len(labelled) else STRENGTHS


def _learn_blocks(
    settings: FrozenConfig,
    labelled: Sequence[Example],
    states_NP: Floats,
    unlabelled: Sequence[Example],
    spread: float,
    seed: int,
) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    if "states" in settings.features:
        arrays |= {"mean": states_NP.mean(0), "deviation": states_NP.std(0) + 1e-6}
    if "words" in settings.features:
        words = Words.fit([told(example) for example in labelled], 2)
        beside = "topics" in settings.features and not any(example.mentions for example in labelled)
        arrays |= {"terms": words.terms, "idf": words.idf, "share": np.array(WORDS if beside else 1.0)}
    if "topics" in settings.features:
        views = _views([*labelled, *unlabelled])
        for view, texts in enumerate(views):
            words = Words.fit(texts, 2)
            axes = min(
                settings.topics or (TOPICS if len(views) == 1 else TOPICS_BESIDE), len(words.terms) - 1, len(texts) - 1
            )
            found = TruncatedSVD(axes, random_state=seed).fit(words(texts))
            arrays |= {f"topic{view}_terms": words.terms, f"topic{view}_idf": words.idf}
            arrays[f"topic{view}_axes"] = (found.components_ / found.singular_values_[:, None] ** spread).astype(
                np.float32
            )
    return arrays
