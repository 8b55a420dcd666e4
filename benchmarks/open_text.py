"""The files of benchmarks/downstream.py, from open text: who is learned from and who is tested is settled here, once.

    open.csv      what the language model reads first: reports that no task asks about, case reports, Wikipedia
    notes.csv     every distinct report of MTSamples: patient, text
    specialty.csv the reports with one specialty of the ten most frequent
    status.jsonl  the reports of mention_status.jsonl, each mention with its status
    folds.csv     patient → one of five folds, the same for both tasks

A "patient" is a report with all that are nearly the same as it, in whichever of the files (MTSamples has no patients).
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from downstream.leakage import alike

FOLDS, TOP = 5, 10
# These name the kind of document, not the specialty.
KINDS = {
    *("Consult - History and Phy.", "SOAP / Chart / Progress Notes", "Discharge Summary", "Office Notes", "Letters"),
    *("Emergency Room Reports", "Surgery", "General Medicine"),
}
RUN = 6  # words; reports that share a third of their runs with a note without headings are where it is from


def write(data: Path, out: Path) -> dict[str, int]:
    """Writes the files from CHARTLM_DATA into `out`; returns how many rows each has."""
    csv.field_size_limit(10**9)
    out.mkdir(parents=True, exist_ok=True)
    labels: dict[str, set[str]] = defaultdict(set)
    with (data / "mtsamples/mtsamples.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if text := row["transcription"].strip():
                labels[text].add(row["medical_specialty"].strip())
    texts = list(labels)
    status = [json.loads(line) for line in (data / "mtsamples/mention_status.jsonl").open()]
    source = _sources([note["text"] for note in status], texts)
    patients = _patients(texts, [note["text"] for note in status], source)
    of_text, of_status = patients[: len(texts)], patients[len(texts) :]

    single = {text: next(iter(found - KINDS)) for text, found in labels.items() if len(found - KINDS) == 1}
    top = {name for name, _ in Counter(single.values()).most_common(TOP)}
    specialty = [(of_text[n], text, single[text]) for n, text in enumerate(texts) if single.get(text) in top]
    asked = {patient for patient, *_ in specialty} | set(of_status)
    free = [("mtsamples", text) for n, text in enumerate(texts) if of_text[n] not in asked]
    rows = [*free, *_case_reports(data), *_wikipedia(data)]
    _csv(out / "open.csv", ["patient", "text"], ((f"open-{kind}-{n}", text) for n, (kind, text) in enumerate(rows)))
    _csv(out / "notes.csv", ["patient", "text"], zip(of_text, texts, strict=True))
    _csv(out / "specialty.csv", ["patient", "text", "specialty"], specialty)
    with (out / "status.jsonl").open("w") as file:
        for patient, note in zip(of_status, status, strict=True):
            file.write(json.dumps(note | {"patient_id": patient}) + "\n")
    everybody = sorted(set(patients))
    _csv(out / "folds.csv", ["patient", "fold"], ((patient, str(_fold(patient))) for patient in everybody))
    return {
        "open": len(rows), "open_mtsamples": len(free), "notes": len(texts), "specialty": len(specialty),
        "status_notes": len(status), "mentions": sum(len(note["spans"]) for note in status),
    }  # fmt: skip


def write_unread(data: Path, out: Path) -> dict[str, int]:
    """Writes open.csv for a language model that has read nothing of what benchmarks/concepts.py tests: every distinct
    report of MTSamples, MTS-Dialog's training passages with their dialogues, Wikipedia; no report that holds a passage
    of MTS-Dialog's validation set (they are from MTSamples). Returns how many rows of each.
    """
    out.mkdir(parents=True, exist_ok=True)
    train = _rows(data / "mts_dialog/MTS-Dialog-TrainingSet.csv")
    passages = [row[part] for row in train for part in ("section_text", "dialogue")]
    rows = [("mtsamples", report) for report in reports_unread(data)]
    rows += [("mts_dialog", passage) for passage in _unread(passages, data)]
    rows += _wikipedia(data)
    _csv(out / "open.csv", ["patient", "text"], ((f"open-{kind}-{n}", text) for n, (kind, text) in enumerate(rows)))
    return dict(Counter(kind for kind, _ in rows))


def reports_unread(data: Path) -> list[str]:
    """Every distinct report of MTSamples that holds no passage of MTS-Dialog's validation set."""
    reports = [row["transcription"].strip() for row in _rows(data / "mtsamples/mtsamples.csv")]
    return _unread(dict.fromkeys(reports), data)


def _unread(texts: Iterable[str], data: Path) -> list[str]:
    asked = [_runs(row["section_text"].lower()) for row in _rows(data / "mts_dialog/MTS-Dialog-ValidationSet.csv")]
    found = []
    for text in texts:
        runs = _runs(text.lower())
        if text and not any(5 * len(passage & runs) >= len(passage) > 0 for passage in asked):
            found.append(text)
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(10**9)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _fold(patient: str) -> int:
    return int(hashlib.sha256(patient.encode()).hexdigest(), 16) % FOLDS + 1


def _runs(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[n : n + RUN]) for n in range(len(words) - RUN + 1)}


def _sources(stripped: Sequence[str], texts: Sequence[str]) -> list[int | None]:
    """The report that each note without headings is from."""
    holders: dict[str, list[int]] = defaultdict(list)
    for n, text in enumerate(texts):
        for run in _runs(text):
            holders[run].append(n)
    found: list[int | None] = []
    for text in stripped:
        runs = _runs(text)
        shared = Counter(n for run in runs for n in holders.get(run, ()))
        best = shared.most_common(1)
        found.append(best[0][0] if best and 3 * best[0][1] >= len(runs) else None)
    return found


def _patients(texts: Sequence[str], stripped: Sequence[str], source: Sequence[int | None]) -> list[str]:
    """A name for every report and every note without headings, the same for those that belong together."""
    root = list(range(len(texts) + len(stripped)))

    def find(n: int) -> int:
        while root[n] != n:
            root[n] = root[root[n]]
            n = root[n]
        return n

    pairs: Iterable[tuple[int, int]] = [
        *alike(texts),
        *((len(texts) + a, len(texts) + b) for a, b in alike(stripped)),
        *((len(texts) + n, other) for n, other in enumerate(source) if other is not None),
    ]
    for a, b in pairs:
        root[find(a)] = find(b)
    return [f"m{find(n)}" for n in range(len(root))]


def _case_reports(data: Path) -> list[tuple[str, str]]:
    return [
        (name, json.loads(line)["text"])
        for name in ("maccrobat2020", "negex")
        for line in (data / f"concepts/{name}.jsonl").open()
    ]


def _wikipedia(data: Path) -> list[tuple[str, str]]:
    joined = "".join((data / f"wikitext-2/{split}.txt").read_text() for split in ("valid", "test"))
    articles = re.split(r"\n(?= = [^=])", joined)
    return [("wikitext", article.replace("<unk>", "")) for article in articles if article.strip()]


def _csv(path: Path, header: list[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows(rows)
