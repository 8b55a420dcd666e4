"""Files and URLs: the only door to fsspec.

Everything chartlm reads or writes is named by a URL (`runs/demo`, `/data/x`, `s3://bucket/x`, `memory://x`).
Writing is atomic: a file appears whole under its name or not at all, so a reader never meets half a file. Local
files are written under a temporary name, synced and renamed; remote ones are staged locally and uploaded in one
piece. Failures come out as StorageError with the URL and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from cluster.errors import ConfigError, StorageError

CHUNK_BYTES = 4 << 20


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except (ImportError, ValueError) as exc:
        raise StorageError(f"{url}: cannot be opened ({exc}); install the fsspec driver of its scheme") from exc


def is_local(url: str) -> bool:
    """Whether the URL names a file of this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """Path of a local URL. Raises StorageError for a remote one."""
    if not is_local(url):
        raise StorageError(f"{url}: a local path is needed here")
    return Path(url.removeprefix("file://"))


def absolute(url: str) -> str:
    """The same place named so that processes with another working directory find it."""
    return str(local_path(url).absolute()) if is_local(url) else url


def join(url: str, *parts: str) -> str:
    """`url` with `parts` appended, separated by single slashes."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


@contextlib.contextmanager
def _named(url: str, doing: str) -> Iterator[None]:
    """Turns the system's errors into one line that names the URL."""
    try:
        yield
    except FileNotFoundError as exc:
        raise StorageError(f"{url}: no such file; check the path") from exc
    except PermissionError as exc:
        raise StorageError(f"{url}: permission denied while {doing}; check its owner and mode") from exc
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"{url}: no space left while {doing}; free some space and run the same command again"
            ) from exc
        raise StorageError(f"{url}: {exc.strerror or exc} while {doing}") from exc


@contextlib.contextmanager
def reader(url: str, compression: str | None = "infer") -> Iterator[BinaryIO]:
    """Binary stream of a URL; `.gz`, `.bz2`, `.xz`, `.zst` are decompressed unless `compression=None`."""
    with _named(url, "reading"), fsspec.open(url, "rb", compression=compression) as stream:
        yield cast(BinaryIO, stream)


def is_compressed(url: str) -> bool:
    """Whether the ending of the name tells of a compressed file (`.gz`, `.bz2`, `.xz`, `.zst`)."""
    return fsspec.utils.infer_compression(url) is not None


@contextlib.contextmanager
def decompressed(url: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed stream of a URL and the stored one below it, whose `tell` says how far it has been read."""
    with reader(url, compression=None) as stored, _named(url, "decompressing"):
        name = fsspec.utils.infer_compression(url)
        with contextlib.closing(fsspec.compression.compr[name](stored, mode="rb")) as stream:
            yield cast(BinaryIO, stream), stored


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of the stored file. Raises StorageError where it ends before."""
    with reader(url, compression=None) as stream, _named(url, "reading"):
        stream.seek(start)
        data = stream.read(end - start)
    if len(data) != end - start:
        raise StorageError(f"{url}: ends before byte {end}; it was changed while it was read")
    return data


def expand(url: str) -> list[str]:
    """The files a URL names, sorted: itself, all below a folder, or those that match its `*`, `?`, `[…]`.

    Hidden files and markers such as `_SUCCESS` are left out. Raises StorageError where there is none.
    """
    filesystem, path = _filesystem(url)
    with _named(url, "listing"):
        if fsspec.core.has_magic(path):
            found = filesystem.glob(path)
        elif filesystem.isdir(path):
            found = filesystem.find(path)
        else:
            return [url]
    kept = sorted(name for name in found if not name.rsplit("/", 1)[-1].startswith((".", "_")))
    if not kept:
        raise StorageError(f"{url}: no such file; check the path")
    return kept if is_local(url) else [filesystem.unstrip_protocol(name) for name in kept]


@contextlib.contextmanager
def atomic_writer(url: str, durable: bool = True) -> Iterator[BinaryIO]:
    """Binary stream whose content appears under `url` when the block ends, and never if it raises.

    Where it need not be `durable`, a power cut may take the file, or leave it shorter; a killed process never does.
    """
    with _named(url, "writing"):
        if is_local(url):
            path = local_path(url)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                with open(temporary, "wb") as stream:
                    yield stream
                    if durable:
                        stream.flush()
                        os.fsync(stream.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            if durable:
                _sync_directory(path.parent)
        else:
            filesystem, remote = _filesystem(url)
            with tempfile.TemporaryDirectory(prefix="chartlm-") as folder:
                staged = os.path.join(folder, "staged")
                with open(staged, "wb") as stream:
                    yield stream
                filesystem.put_file(staged, remote)


def _sync_directory(path: Path) -> None:
    """Makes a rename durable: without it a power cut may bring the old name back."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(url: str, data: bytes, durable: bool = True) -> None:
    """Writes `data` under `url`, atomically."""
    with atomic_writer(url, durable) as stream:
        stream.write(data)


def read_bytes(url: str) -> bytes:
    """The whole content of `url`, as stored."""
    with reader(url, compression=None) as stream:
        return stream.read()


def write_json(url: str, value: Any, durable: bool = True) -> None:
    """Writes `value` as indented JSON with sorted keys (the same value gives the same bytes)."""
    write_bytes(url, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode(), durable)


def read_json(url: str) -> Any:
    """The JSON value stored under `url`. Raises StorageError where it is not JSON."""
    try:
        return json.loads(read_bytes(url))
    except ValueError as exc:
        raise StorageError(f"{url}: is not valid JSON; it was damaged or is another kind of file") from exc


def exists(url: str) -> bool:
    """Whether there is a file or folder of that name."""
    filesystem, path = _filesystem(url)
    with _named(url, "looking for it"):
        return bool(filesystem.exists(path))


def names(url: str) -> list[str]:
    """Sorted names of what lies in a folder; empty where there is no such folder."""
    filesystem, path = _filesystem(url)
    with _named(url, "listing"):
        filesystem.invalidate_cache()
        if not filesystem.isdir(path):
            return []
        found = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(path, detail=False)}
    return sorted(name for name in found if not name.endswith(".tmp"))


def size_bytes(url: str) -> int:
    """Size of a stored file in bytes."""
    filesystem, path = _filesystem(url)
    with _named(url, "looking at its size"):
        return int(filesystem.size(path))


def sha256(url: str) -> str:
    """Hex sha256 of the stored bytes."""
    digest = hashlib.sha256()
    with reader(url, compression=None) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# Name of the file by which a process holds a folder.
LOCK = ".lock"


@contextlib.contextmanager
def held(folder: str, busy: str, patience_seconds: float = 0.0) -> Iterator[None]:
    """Keeps every other process of this machine out of a folder; raises ConfigError(`busy`) where one is in it.

    The lock ends with the process, however it dies. An object store has no locks: nothing is held there.
    """
    if not is_local(folder):
        yield
        return
    with _named(folder, "locking"):
        local_path(folder).mkdir(parents=True, exist_ok=True)
        lock = open(local_path(folder) / LOCK, "a")  # noqa: SIM115 - closed below
    with lock:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ConfigError(busy) from None
                time.sleep(0.2)
        yield


def remove(url: str) -> None:
    """Removes a file or a folder with all that is in it; nothing happens where there is none."""
    filesystem, path = _filesystem(url)
    with _named(url, "removing"), contextlib.suppress(FileNotFoundError):
        filesystem.rm(path, recursive=True)


def fetch(url: str, folder: Path) -> Path:
    """Local path of a URL: the file itself where it is local, else a copy put into `folder`."""
    if is_local(url):
        return local_path(url)
    filesystem, remote = _filesystem(url)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / url.rsplit("/", 1)[-1]
    with _named(url, "downloading"):
        filesystem.get_file(remote, str(target))
    return target
