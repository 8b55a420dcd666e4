"""What is said of mentions, against rules and a linear model, on public annotated notes; folds by document.

    CHARTLM_DATA=DATA .venv/bin/python benchmarks/concepts.py [work=DIR] [rivals=PYTHON]

Every row of a table is of one run, on the same folds: `reader` is ours (rules, words, and, with `work`, the states of
two language models, one of which reads backwards), `plain` the same without them, `rules` ours without learning,
`words` TF-IDF of the words beside the mention with logistic regression. The models are trained in `work`, an hour on
two cores, on open text in which nothing is that is tested here; interrupted, the same command goes on. There they also
learn from passages of known sections (`[tune] epochs=5`). For MACCROBAT the reader (and `plain`) also learns from
NegEx and from what MTSamples' headings say of conditions, as `finetune beside=` does; for its history models learn from
these, from what those headings say of clauses (`sections=`), and then from the reports of the other folds, half an hour
more (`untuned` is without such models). `rivals` is the Python of an environment as concepts_rivals.py describes. F1
with 95% intervals over documents.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

# Python looks for modules beside the script, where `sharding` is another file.
BESIDE = sys.path[0]
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.append(BESIDE)

import numpy as np  # noqa: E402
import open_text  # noqa: E402  (benchmarks/open_text.py)
from given import given  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.model_selection import GroupKFold  # noqa: E402

from cluster.config import fingerprint  # noqa: E402
from downstream.concepts import clauses, dates, labs, schema, sections  # noqa: E402
from downstream.concepts.annotate import Annotator  # noqa: E402
from downstream.concepts.attributes import Attribute, Attributes  # noqa: E402
from downstream.concepts.cues import DEFAULTS  # noqa: E402
from downstream.concepts.evaluate import Fold, folded, out_of_fold, scored  # noqa: E402
from downstream.concepts.features import Examples  # noqa: E402
from downstream.concepts.learning import TuneConfig  # noqa: E402
from downstream.concepts.mentions import Concept, Finder  # noqa: E402
from downstream.concepts.passages import TunedPassages  # noqa: E402
from downstream.concepts.reader import Reader  # noqa: E402
from downstream.concepts.schema import Note  # noqa: E402
from downstream.concepts.states import States  # noqa: E402
from downstream.concepts.tagger import SectionTagger, _normal  # noqa: E402
from downstream.concepts.train import OTHERS  # noqa: E402
from downstream.concepts.tuned import Tuned, Tuner  # noqa: E402
from downstream.concepts.words import Text  # noqa: E402
from downstream.work import open_models  # noqa: E402

FINDINGS = {"Sign_symptom", "Disease_disorder"}
EVENTS = FINDINGS | {"Diagnostic_procedure", "Medication", "Therapeutic_procedure", "Clinical_event"}
# Of MACCROBAT: attribute, value, labels of the mentions.
ASKED = {
    "negation": ("negation", "negated", EVENTS),
    "uncertainty": ("certainty", "uncertain", EVENTS),
    "history": ("temporality", "historical", FINDINGS | {"History"}),
    "family": ("experiencer", "family", FINDINGS | {"Family_history"}),
}
TUNED = {"history"}  # of which headings say most; each takes half an hour
TIMES = {"CURRENT": "current", "PAST": "historical"}
TUNE = TuneConfig(epochs=5)
NOTE_DATE = date(2015, 8, 2)  # the case reports have none
FEW, DRAWS = 200, 5
MOST = 600  # passages of a section from other notes
# The sizes of the language models, and seven passes: on a processor that multiplies bf16 an hour, both at a time.
SIZES = ("model.width=192", "model.heads=6", "model.inner=768", "model.drop=0.15", "epochs=7", "engine.precision=bf16")


class Corpus(NamedTuple):
    """The spans of a corpus, flat, in which sentence each is, and those of other corpora that it is learned with."""

    examples: Examples
    sentences: list[tuple[str, int]]
    rivals: list[dict[str, dict[str, str]]]  # by mention what each system says
    others: Examples | None = None

    @classmethod
    def of(cls, notes: list[Note], states: States | None, python: str) -> Corpus:
        """All spans of the notes."""
        sentences, asked = [], []
        for note in notes:
            text = Text(note.text)
            for span in note.spans:
                first, last = text.span_of(span.start, span.end)
                begin, end = text.starts[text.sentence(first)[0]], text.ends[text.sentence(last - 1)[1] - 1]
                sentences.append((note.doc_id, text.sentence(first)[0]))
                asked.append({"text": note.text[begin:end], "start": span.start - begin, "end": span.end - begin})
        rivals: list[dict[str, dict[str, str]]] = [{} for _ in asked]
        if python:
            lines = "".join(json.dumps(one) + "\n" for one in asked)
            command = [python, str(Path(BESIDE) / "concepts_rivals.py")]
            done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, text=True, check=True)
            rivals = [json.loads(line) for line in done.stdout.splitlines()]
        return cls(Examples.of(notes, states), sentences, rivals)


class Said(NamedTuple):
    """Truth, and what every system says, of the same mentions."""

    truth: np.ndarray
    systems: dict[str, np.ndarray]
    documents: list[str]
    rows: np.ndarray


class Kept(Tuner):
    """Tuned models that are kept in a folder, by all that they are learned from."""

    folder: Path

    @cached_property
    def about(self) -> str:
        """What all of them are learned from."""
        models = [trained.checkpoint_sha256 for trained in self.models]
        notes = [note.record() for note in (*self.notes, *self.others)]
        return fingerprint([models, self.config.model_dump(), notes])

    def fit(self, documents: Iterable[str]) -> Tuned:
        """The same; read, where they were learned before."""
        return self._kept(fingerprint(sorted(set(documents))), lambda: super(Kept, self).fit(documents))

    @cached_property
    def begun(self) -> Tuned | None:
        """The same."""
        return self._kept("begun", lambda: super(Kept, self).begun)

    def _kept(self, name: str, learn: Callable[[], Any]) -> Any:
        kept, begun = self.folder / f"tuned-{self.about[:8]}-{name[:16]}.npz", time.monotonic()
        if not kept.exists():
            unfinished = kept.with_suffix(".tmp.npz")
            np.savez(unfinished, allow_pickle=False, **learn().arrays())
            unfinished.replace(kept)
            print(f"{kept.name}: {time.monotonic() - begun:.0f} s", flush=True)
        with np.load(kept) as arrays:
            return Tuned.load(arrays, self.models)


def tuner_of(notes: list[Note], states: States, others: list[Note], folder: Path) -> Kept:
    """One that learns what is asked of all four attributes at once; where one is not annotated it counts as usual."""
    told = []
    for note in notes:
        spans = []
        for span in note.spans:
            said = {
                axis: value if span.attributes.get(axis) == value else DEFAULTS[axis]
                for axis, value, labels in ASKED.values()
                if span.label in labels
            }
            spans.append(span.model_copy(update={"attributes": said}))
        told.append(note.model_copy(update={"spans": spans}))
    tuner = Kept(states.models, told, TUNE, others)
    tuner.folder = folder
    return tuner


def with_tuned(cut: list[Fold], tuner: Tuner, every: Examples, rows: np.ndarray) -> list[Fold]:
    """The same folds, of some rows of all mentions, with what models say that were tuned on the others' reports."""
    chosen = np.isin(np.arange(len(every.spans)), rows)
    found = []
    for fold in cut:
        mine = np.isin(every.documents, fold.known.documents)
        asked = tuner.read(tuner.fit(fold.known.documents), every.rows(np.flatnonzero(~mine)))
        known = tuner.crossed(every.rows(np.flatnonzero(mine)))
        heard = [part.rows(np.flatnonzero(chosen[which])).tuned for part, which in ((known, mine), (asked, ~mine))]
        told = [part._replace(tuned=one) for part, one in zip((fold.known, fold.asked), heard, strict=True)]
        found.append(fold._replace(known=told[0], asked=told[1]))
    return found


def compared(
    corpus: Corpus,
    axis: str,
    value: str,
    labels: set[str] | None,
    few: int = 0,
    seed: int = 0,
    tuner: Tuner | None = None,
) -> Said:
    """Five folds by document; with `few` so many mentions of the other folds are learned from. Where an attribute is
    not annotated it counts as usual: MACCROBAT marks only what is not.
    """
    every = corpus.examples
    rows = np.array([i for i, span in enumerate(every.spans) if labels is None or span.label in labels])
    chosen = every.rows(rows)
    truth = np.array([span.attributes.get(axis) == value for span in chosen.spans])
    told = [
        span.model_copy(update={"attributes": {axis: value if true else DEFAULTS[axis]}})
        for span, true in zip(chosen.spans, truth, strict=True)
    ]
    cut = folded(chosen._replace(spans=told), chosen.documents, 5, seed, None, corpus.others)
    if tuner:
        cut = with_tuned(cut, tuner, every, rows)
    said = out_of_fold(cut, axis, seed, few)
    for name in corpus.rivals[0]:
        said[name] = np.array([corpus.rivals[i][name].get(axis, DEFAULTS[axis]) for i in rows])
    return Said(truth, {name: one == value for name, one in said.items()}, chosen.documents.tolist(), rows)


def f1(truth: np.ndarray, said: np.ndarray) -> float:
    """In percent."""
    return 200 * float((truth & said).sum()) / max(1.0, float(truth.sum() + said.sum()))


def show(title: str, found: Said) -> float:
    """Prints every system's row; the reader's F1 in percent."""
    print(f"\n{title}: {found.truth.sum():,} of {len(found.truth):,} mentions")
    for name, one in scored(found.truth, found.systems, found.documents).items():
        gain = "  reader {:+.1f} [{:.1f}, {:.1f}]".format(*(100 * part for part in one.get("reader_gain", (0, 0, 0))))
        print(
            f"  {name:<8} P {100 * one['precision']:5.1f}  R {100 * one['recall']:5.1f}  F1 {100 * one['f1']:5.1f} "
            f"[{100 * one['f1_low']:.1f}, {100 * one['f1_high']:.1f}]{gain if name != 'reader' else ''}"
        )
    return round(f1(found.truth, found.systems["reader"]), 1)


def mixed(corpus: Corpus, found: Said) -> float:
    """Accuracy in percent in sentences that deny one thing and affirm another."""
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place, row in enumerate(found.rows):
        groups[corpus.sentences[row]].append(place)
    places = [i for group in groups.values() if len({bool(found.truth[i]) for i in group}) > 1 for i in group]
    for name, said in found.systems.items():
        print(f"  mixed sentences, {name:<8} {100 * np.mean(said[places] == found.truth[places]):.1f} of {len(places)}")
    return round(100 * float(np.mean(found.systems["reader"][places] == found.truth[places])), 1)


def few_labels(corpus: Corpus) -> float:
    """Mean over draws of 200 mentions, in percent."""
    draws = [compared(corpus, "negation", "negated", None, FEW, seed) for seed in range(DRAWS)]
    print(f"\nNegEx, {FEW} labels, mean of {DRAWS} draws")
    means = {}
    for name in draws[0].systems:
        all_f1 = [f1(one.truth, one.systems[name]) for one in draws]
        means[name] = statistics.mean(all_f1)
        print(f"  {name:<8} F1 {means[name]:5.1f} ({min(all_f1):.1f} to {max(all_f1):.1f})")
    return round(means["reader"], 1)


def from_headings(data: Path) -> list[Note]:
    """The conditions of MTSamples, and what the heading above each says: PAST, FAMILY or CURRENT; a review of systems
    only that it is of the patient.
    """
    notes = list(schema.read(str(data / "mtsamples/mention_status.jsonl")))
    for note in notes:
        for span in note.spans:
            status = span.attributes.pop("status")
            span.attributes["experiencer"] = "family" if status == "FAMILY" else "patient"
            if status in TIMES:
                span.attributes["temporality"] = TIMES[status]
    return notes


def transfer(negex: Corpus, maccrobat: Corpus) -> None:
    """Learned on one corpus, tested on the other: what is lost."""
    print("\nnegation, learned on one corpus and tested on the other")
    for name, learned, tested in (("NegEx → MACCROBAT", negex, maccrobat), ("MACCROBAT → NegEx", maccrobat, negex)):
        known, asked = learned.examples.having("negation"), tested.examples.having("negation")
        attribute = Attribute.fit(known, "negation")
        truth = np.array([span.attributes["negation"] == "negated" for span in asked.spans])
        said = np.array(attribute.classes)[attribute(asked, "negation")[1]] == "negated"
        rules = np.array([mention.rules["negation"] == "negated" for mention in asked.mentions])
        print(f"  {name}: F1 {f1(truth, said):.1f}, rules {f1(truth, rules):.1f}")


UPPER = re.compile(r"(?:^|,|\.  ?)[ ,]*([A-Z][A-Z0-9/&()'\-.#]*(?:, ?(?=AND )| ?[ /&\-] ?[A-Z0-9/&()'\-.#]+)*):", re.M)


def of_sections(data: Path, states: States | None, work: Path) -> tuple[dict[str, float], SectionTagger]:
    """Heading coverage on the half of MTSamples that the table was not written with, and the tagger's accuracy: of
    MTS-Dialog's training passages alone, with MTSamples', with the language models, with these tuned; and the last
    tagger.
    """
    texts = sorted({row["transcription"] for row in _csv(data / "mtsamples/mtsamples.csv") if row["transcription"]})
    known = count = 0
    for text in texts:
        if zlib.crc32(text.encode()) % 2:
            found = {span.heading[1]: span.label for span in sections.find(text) if span.heading}
            ends = [len(text[: heading.end(1)].rstrip()) for heading in UPPER.finditer(text)]
            known += sum(found.get(end, "other") != "other" for end in ends)
            count += len(ends)
    train, valid = (list(_csv(data / f"mts_dialog/MTS-Dialog-{name}Set.csv")) for name in ("Training", "Validation"))
    own = [(row["section_text"], row["section_header"]) for row in train]
    print(f"\nheadings: {100 * known / count:.1f}% of {count:,} are known")
    more = headed(data, [label for _, label in own])
    rows: dict[str, Any] = {
        "training passages": ([], None, None),
        f"and {len(more):,} of MTSamples": (more, None, None),
    }
    if states:
        rows["and the language models"] = (more, states.of_passages, None)
        rows["these tuned on passages"] = (more, states.of_passages, tune_passages(states, more, own, work))
    for name, (others, reads, tuned) in rows.items():
        passages, labels = zip(*own, *others, strict=True)
        tagger = SectionTagger(reads, tuned).fit(passages, labels, weights=[1.0] * len(own) + [OTHERS] * len(others))
        said = tagger.predict([row["section_text"] for row in valid])
        right = [label == row["section_header"] for (label, _), row in zip(said, valid, strict=True)]
        accuracy = 100 * float(np.mean(right))
        print(f"sections, {name:<25} {accuracy:.1f}% of {len(valid)}")
    return {"section_accuracy": round(accuracy, 1), "heading_coverage": round(100 * known / count, 1)}, tagger


def tune_passages(states: States, more: list[tuple[str, str]], own: list[tuple[str, str]], work: Path) -> TunedPassages:
    """Models that learned from these passages, in `work`."""
    about = fingerprint([[trained.checkpoint_sha256 for trained in states.models], TUNE.model_dump(), more, own])
    kept = work / f"passages-{about[:8]}.npz"
    if not kept.exists():
        passes, begun = itertools.count(1), time.monotonic()
        say = lambda: print(f"passages: pass {next(passes)}, {time.monotonic() - begun:.0f} s", flush=True)  # noqa: E731
        tuned = TunedPassages.fit(states.models, more, own, TUNE, say)
        unfinished = kept.with_suffix(".tmp.npz")
        np.savez(unfinished, allow_pickle=False, **tuned.arrays())
        unfinished.replace(kept)
    with np.load(kept) as arrays:
        return TunedPassages.load(arrays, states.models)


def headed(data: Path, labels: list[str]) -> list[tuple[str, str]]:
    """What stands under the headings of MTSamples as (passage, MTS-Dialog's label), at most MOST of a label."""
    known = {_normal(label, ""): label for label, _ in reversed(Counter(labels).most_common())}
    known["family_history"] = known["social_history"]
    found: dict[str, set[str]] = defaultdict(set)
    for text in open_text.reports_unread(data):
        for section in sections.find(text):
            body = text[section.heading[1] : section.end].strip(" ,:\n") if section.heading else ""
            if body and section.label in known:
                found[known[section.label]].add(body)
    by_hash = lambda body: zlib.crc32(body.encode())  # noqa: E731
    return [(body, label) for label in sorted(found) for body in sorted(found[label], key=by_hash)[:MOST]]


def _csv(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 30)
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def lab_links(notes: list[Note]) -> float:
    """Share of values whose test is the right one, in percent; the weights are learned on the other folds."""
    found = []
    for note in notes:
        place = {span.id: (span.start, span.end) for span in note.spans}
        tests = sorted(place[span.id] for span in note.spans if span.label == "Diagnostic_procedure")
        wanted: dict[tuple[int, int], set[int]] = defaultdict(set)
        for relation in note.relations:
            if relation.type == "value_of" and place[relation.tail] in tests:
                wanted[place[relation.head]].add(tests.index(place[relation.tail]))
        found.append((note.text, list(wanted), tests, list(wanted.values())))
    rows = [labs.features(text, values, tests) for text, values, tests, _ in found]
    right = nearest = total = 0
    for learned, held in GroupKFold(5).split(found, groups=range(len(found))):
        pairs = []
        for at in learned:
            for candidates, wanted_of in zip(rows[at], found[at][3], strict=True):
                good = [np.array(row) for place, row in candidates if place in wanted_of]
                bad = [np.array(row) for place, row in candidates if place not in wanted_of]
                pairs += [a - b for a in good for b in bad]
        both = np.concatenate([pairs, -np.array(pairs)])
        one = LogisticRegression(C=0.1, fit_intercept=False, max_iter=2000).fit(both, np.repeat([1, 0], len(pairs)))
        for at in held:
            text, values, tests, wants = found[at]
            linked = labs.link(text, values, tests, one.coef_[0].tolist())
            right += sum(which in may for which, may in zip(linked, wants, strict=True))
            for (start, end), may in zip(values, wants, strict=True):
                nearest += min(range(len(tests)), key=lambda i: max(tests[i][0] - end, start - tests[i][1], 0)) in may
            total += len(values)
    print(
        f"\nlab value to its test: {100 * right / total:.1f}% of {total:,}; nearest test {100 * nearest / total:.1f}%"
    )
    return round(100 * right / total, 1)


def dates_resolved(notes: list[Note]) -> tuple[float, float]:
    """Share of Date spans that give an interval, in percent: with the birth that the note's age says, and without."""
    aged = alone = total = 0
    for note in notes:
        anchors = dates.Anchors(birth=dates.birth_of(note.text, NOTE_DATE))
        for span in note.spans:
            if span.label == "Date":
                phrase = note.text[span.start : span.end]
                total += 1
                aged += dates.resolve(phrase, NOTE_DATE, anchors) is not None
                alone += dates.resolve(phrase, NOTE_DATE) is not None
    print(f"\ndates: {100 * aged / total:.1f}% of {total}; without the patient's age {100 * alone / total:.1f}%")
    return round(100 * aged / total, 1), round(100 * alone / total, 1)


def seconds_a_note(notes: list[Note], reader: Reader) -> float:
    """Median seconds for a note with 200 mentions, all attributes, sections, dates."""
    names = sorted({span.text.lower() for note in notes for span in note.spans if span.label in FINDINGS})
    finder = Finder([Concept(name=name, names=(name,)) for name in names])
    text = "\n".join(note.text for note in notes[:12])
    annotator = Annotator(finder, reader)
    whole = annotator(Note(doc_id="n", text=text, note_date="2015-08-02"))
    mentions = [span for span in whole.spans if span.concept]
    text = text[: mentions[199].end + 1]
    times = []
    for _ in range(7):
        began = time.perf_counter()
        again = annotator(Note(doc_id="n", text=text, note_date="2015-08-02"))
        times.append(time.perf_counter() - began)
    count = sum(span.concept is not None for span in again.spans)
    seconds = statistics.median(times)
    print(f"\n{count} mentions in a note of {len(text):,} characters, {len(names):,} concepts: {seconds:.2f} s")
    return round(statistics.median(times) * 200 / count, 3)


def language_models(data: Path, work: Path) -> States:
    """The models of `work`, trained first where they are not yet: forwards and backwards, one thread each."""
    open_text.write_unread(data, work)
    recipes, command = ROOT / "recipes/open-text", [str(ROOT / "launch.sh")]
    paths = [f"input={work}/open.csv", f"output={work}/shards", "splits.valid=0.02"]
    subprocess.run([*command, "shard", str(recipes / "shard.toml"), *paths], check=True)
    pretrain = [*command, "pretrain", str(recipes / "transformer_xl.toml"), *SIZES, "tracking.wandb=disabled"]
    runs = {backward: work / ("backward" if backward else "forward") for backward in (False, True)}
    trained = [
        subprocess.Popen(
            [*pretrain, f"run_dir={run}", f"data.corpus={work}/shards", f"data.backward={str(backward).lower()}"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        for backward, run in runs.items()
    ]
    codes = [one.wait() for one in trained]
    if any(codes):
        sys.exit("concepts.py: a language model was not trained to its end; the same command goes on")
    return States(open_models(str(runs[False]), str(runs[True])))


def main() -> None:
    """Prints the tables, and as the last line one JSON object."""

    if not os.environ.get("CHARTLM_DATA"):
        sys.exit("concepts.py: set CHARTLM_DATA to the folder that holds concepts, mtsamples and mts_dialog")
    data = Path(os.environ["CHARTLM_DATA"])
    negex = list(schema.read(str(data / "concepts/negex.jsonl")))
    maccrobat = list(schema.read(str(data / "concepts/maccrobat2020.jsonl")))
    words = given({"work": "", "rivals": ""})
    states = language_models(data, Path(words["work"])) if words["work"] else None
    line: dict[str, Any] = {}
    figures, tagger = of_sections(data, states, Path(words["work"]))
    line |= figures
    line["lab_link_accuracy"] = lab_links(maccrobat)
    line["date_resolved"], line["date_resolved_without_age"] = dates_resolved(maccrobat)
    small, large = Corpus.of(negex, states, words["rivals"]), Corpus.of(maccrobat, states, words["rivals"])
    found = compared(small, "negation", "negated", None)
    line["negex_f1"] = show("NegEx, negated", found)
    line["mixed_accuracy"] = mixed(small, found)
    line["negex_f1_200"] = few_labels(small)
    line["negex_historical_f1"] = show("NegEx, historical", compared(small, "temporality", "historical", None))
    beside = [*negex, *from_headings(data)]
    large = large._replace(others=Examples.of(beside, states))
    tuner = None
    if states:
        said = clauses.annotated(open_text.reports_unread(data), [note.text for note in maccrobat])
        tuner = tuner_of(maccrobat, states, [*beside, *said], Path(words["work"]))
    for key, (axis, value, labels) in ASKED.items():
        found = compared(large, axis, value, labels, tuner=tuner if key in TUNED else None)
        line[f"maccrobat_{key}_f1"] = show(f"MACCROBAT, {value}", found)
    transfer(small, large)
    tuned = tuner.begun if tuner else None  # of the size that any has
    reader = Reader(Attributes.fit(large.examples), states, tagger, tuned)
    line["seconds_per_200_concepts"] = seconds_a_note(maccrobat, reader)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
