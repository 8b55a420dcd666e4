"""The other side of `sharding.py`: how fast the tools people use today turn a CSV of notes into token files.

Runs in a virtual environment of its own (`rivals.txt`) and imports nothing of chartlm, so that neither side's
versions bind the other. One call runs one job and prints one JSON object as its last line:

    python sharding_rivals.py JOB csv=FILE model=TOKENIZER.model out=NEW_DIR [text=TEXT] [doc=ROW_ID]
    python sharding_rivals.py read data=DIR/arrow out=NEW_DIR [windows=2000] [format=numpy]

`encode`       the yardstick: `sp.encode(texts)` on one thread, texts in memory before the clock starts, ids kept
               nowhere. No rival that gives whole notes to SentencePiece can be faster.
`hf_datasets`  load_dataset("csv") → map → save_to_disk, in one process.
`datatrove`    CsvReader → DocumentTokenizer, one local task, one thread. It takes Hugging Face tokenizers only, so
               the model is converted before the clock starts, with rules that keep the ids of SentencePiece.
`ray_data`     read_csv → map_batches on one actor → write_parquet. The reader has a core beside the actor's, so
               compare `cpu_seconds` too. ray.init is not timed, the start of the actor is: every run pays for it.
`read`         random batches of 16 rows of 513 tokens, as int64, from the notes that `hf_datasets` saved, packed
               into such rows before the clock starts; format=arrow steps around Datasets' numpy formatter.

All but `encode` and `read` leave every note's tokens in a file, and `notes` and `tokens` are counted there, so a
rival that loses notes shows it. `bytes` is the UTF-8 of the texts as Python's csv module reads them; for `read`, of
the int64 batches. Imports are not timed; `cpu_seconds` includes child processes.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

DEFAULTS = {"csv": "", "model": "", "text": "TEXT", "doc": "ROW_ID", "windows": "2000", "format": "numpy"}
WINDOW_ROWS, WINDOW_TOKENS = 16, 513
# The actor holds one core; without another for the reader, Ray Data waits forever and says nothing.
RAY_CPUS = 2
CPU_SAMPLE_SECONDS = 0.2
SETTLED_SECONDS = 10  # until the processes of Ray that start in the background have started

Count = Callable[[], tuple[int, int]]
Work = Callable[[], Count]


def encode(options: SimpleNamespace) -> Work:
    pieces = SentencePieceProcessor(model_file=options.model)
    texts = list(_texts(options))

    def work() -> Count:
        ids = pieces.encode(texts, num_threads=1)
        return lambda: (len(ids), sum(map(len, ids)))

    return work


def hf_datasets(options: SimpleNamespace) -> Work:
    import datasets

    datasets.disable_progress_bars()
    pieces = SentencePieceProcessor(model_file=options.model)
    saved = f"{options.out}/arrow"

    def work() -> Count:
        # pandas would make missing values of notes that say "NA".
        as_written = {"usecols": [options.doc, options.text], "keep_default_na": False}
        cache = f"{options.out}/cache"
        notes = datasets.load_dataset("csv", data_files=options.csv, split="train", cache_dir=cache, **as_written)
        tokens_type = datasets.List(datasets.Value(str(_token_type(pieces))))
        notes.map(
            lambda texts: {"tokens": pieces.encode(texts, num_threads=1)},
            input_columns=options.text,
            batched=True,
            remove_columns=options.text,
            features=datasets.Features({options.doc: notes.features[options.doc], "tokens": tokens_type}),
        ).save_to_disk(saved)
        return lambda: _column_counts(datasets.load_from_disk(saved).data.column("tokens"))

    return work


def datatrove(options: SimpleNamespace) -> Work:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import CSVReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    source, tokens, converted = Path(options.csv), Path(options.out, "tokens"), f"{options.out}/tokenizer.json"
    _huggingface_tokenizer(Path(options.model)).save(converted)
    reader = CSVReader(str(source.parent), glob_pattern=source.name, text_key=options.text, id_key=options.doc)
    writer = DocumentTokenizer(str(tokens), converted, shuffle_documents=False)
    executor = LocalPipelineExecutor([reader, writer], tasks=1, workers=1, logging_dir=f"{options.out}/logs")

    def work() -> Count:
        executor.run()
        note_ends_tokens = np.fromfile(next(tokens.glob("*.index")), dtype="<u8")
        return lambda: (len(note_ends_tokens), int(note_ends_tokens[-1]))

    return work


def ray_data(options: SimpleNamespace) -> Work:
    import ray
    import ray.data
    from pyarrow.csv import ConvertOptions, ParseOptions

    ray.init("local", num_cpus=RAY_CPUS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    time.sleep(SETTLED_SECONDS)
    saved = f"{options.out}/parquet"
    several_lines = ParseOptions(newlines_in_values=True)
    as_written = ConvertOptions(include_columns=[options.doc, options.text], column_types={options.text: pa.string()})

    class Encoder:
        def __init__(self) -> None:
            self.pieces = SentencePieceProcessor(model_file=options.model)

        def __call__(self, notes: pa.Table) -> pa.Table:
            ids = self.pieces.encode(notes[options.text].to_pylist(), num_threads=1)
            tokens = pa.array(ids, pa.list_(_token_type(self.pieces)))
            return pa.table({options.doc: notes[options.doc], "tokens": tokens})

    def work() -> Count:
        notes = ray.data.read_csv(options.csv, parse_options=several_lines, convert_options=as_written)
        one_actor = ray.data.ActorPoolStrategy(size=1)
        notes.map_batches(Encoder, compute=one_actor, num_cpus=1, batch_format="pyarrow").write_parquet(saved)
        return lambda: _column_counts(pyarrow.parquet.read_table(saved, columns=["tokens"])["tokens"])

    return work


def read(options: SimpleNamespace) -> Work:
    import datasets

    datasets.disable_progress_bars()
    notes = datasets.load_from_disk(options.data).data.column("tokens")
    stream = np.concatenate([chunk.flatten().to_numpy() for chunk in notes.chunks])
    rows = len(stream) // WINDOW_TOKENS
    packed = pa.FixedSizeListArray.from_arrays(pa.array(stream[: rows * WINDOW_TOKENS]), WINDOW_TOKENS)
    datasets.Dataset(pa.table({"tokens": packed})).save_to_disk(f"{options.out}/packed")
    dataset = datasets.load_from_disk(f"{options.out}/packed").with_format(options.format)
    windows = np.random.default_rng(0).integers(rows, size=(int(options.windows), WINDOW_ROWS))

    def tokens_BT(window: np.ndarray) -> np.ndarray:
        tokens = dataset[window]["tokens"]
        if options.format == "arrow":
            tokens = tokens.combine_chunks().flatten().to_numpy().reshape(WINDOW_ROWS, WINDOW_TOKENS)
        return tokens.astype(np.int64)

    def work() -> Count:
        tokens = sum(tokens_BT(window).size for window in windows)
        return lambda: (len(notes), tokens)

    return work


JOBS = {"encode": encode, "hf_datasets": hf_datasets, "datatrove": datatrove, "ray_data": ray_data, "read": read}


def _texts(options: SimpleNamespace) -> Iterator[str]:
    with open(options.csv, encoding="utf-8", newline="") as file:
        yield from (note[options.text] for note in csv.DictReader(file))


def _token_type(pieces: SentencePieceProcessor) -> pa.DataType:
    return pa.uint16() if pieces.vocab_size() <= 1 << 16 else pa.uint32()


def _column_counts(tokens: pa.ChunkedArray) -> tuple[int, int]:
    return len(tokens), pc.sum(pc.list_value_length(tokens)).as_py()


def _huggingface_tokenizer(model_file: Path) -> Tokenizer:
    """The SentencePiece model in `model_file` for `tokenizers`, as `convert_slow_tokenizer` of transformers makes it.

    Only blanks are treated as SentencePiece does (transformers strips final newlines too). So the ids agree but where
    two segmentations have equal scores, and, for BPE, where a note spells out a user-defined symbol.
    """
    model = ModelProto.FromString(model_file.read_bytes())
    trained = model.trainer_spec
    scores = [(piece.piece, piece.score) for piece in model.pieces]
    ids = {piece: index for index, (piece, _) in enumerate(scores)}
    if trained.model_type == trained.UNIGRAM:
        encoder = models.Unigram(scores, unk_id=trained.unk_id, byte_fallback=trained.byte_fallback)
    else:
        merges = [merge for piece in model.pieces if piece.type == piece.NORMAL for merge in _merges(piece.piece, ids)]
        unknown = {"unk_token": scores[trained.unk_id][0], "fuse_unk": True, "byte_fallback": trained.byte_fallback}
        encoder = models.BPE(ids, merges, **unknown)
    charsmap = model.normalizer_spec.precompiled_charsmap
    characters = [normalizers.Precompiled(charsmap)] if charsmap else []
    blanks = [normalizers.Replace(Regex(r"\A +| +\z| +(?= )"), ""), normalizers.Prepend("▁")]
    tokenizer = Tokenizer(encoder)
    tokenizer.normalizer = normalizers.Sequence(characters + blanks)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    return tokenizer


def _merges(piece: str, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of known pieces that makes `piece`; first the pair whose left piece is the most frequent."""
    halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    known = [(left, right) for left, right in halves if left in ids and right in ids]
    return sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _cpu_seconds() -> dict[int, float]:
    """CPU time so far of this process and each living descendant, by process id."""
    seconds = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds[process.pid] = times.user + times.system
    return seconds


@contextlib.contextmanager
def _cpu_seconds_inside() -> Iterator[dict[int, float]]:
    """CPU time spent inside the block, by process id; complete when the block ends.

    Sampled, because Ray's actors die before the job ends and nobody waits for them.
    """
    before, used, over = _cpu_seconds(), {}, threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = over.wait(CPU_SAMPLE_SECONDS)
            used.update({process: seconds - before.get(process, 0) for process, seconds in _cpu_seconds().items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield used
    finally:
        over.set()
        watcher.join()


def main(job: str, *settings: str) -> None:
    options = SimpleNamespace(**DEFAULTS | dict(setting.split("=", 1) for setting in settings))
    os.makedirs(options.out)  # An old directory is refused: Datasets would time its cache.
    csv.field_size_limit(sys.maxsize)  # Python's 128 KiB would end datatrove's reader at the first long note.
    work = JOBS[job](options)
    with _cpu_seconds_inside() as cpu_seconds:
        started = time.perf_counter()
        count = work()
        seconds = time.perf_counter() - started
    notes, tokens = count()
    result = {"job": job, "seconds": seconds, "cpu_seconds": sum(cpu_seconds.values())}
    result |= {"notes": notes, "tokens": tokens}
    if job == "read":
        result |= {"bytes": tokens * np.dtype(np.int64).itemsize, "mtokens_per_s": tokens / seconds / 1e6}
    else:
        result |= {"bytes": sum(len(text.encode()) for text in _texts(options))}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
