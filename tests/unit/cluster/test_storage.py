import gzip
import os
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import StorageError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "r") if request.param == "local" else f"memory://{tmp_path.name}/r"


def test_write_read_list_remove(root: str) -> None:
    place = storage.join(root, "a", "b.bin")
    assert not storage.exists(place)
    storage.write_bytes(place, b"abc")
    storage.write_json(storage.join(root, "a", "c.json"), {"x": 1.5})
    assert storage.read_bytes(place) == b"abc"
    assert storage.size_bytes(place) == 3
    assert storage.sha256(place) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.names(storage.join(root, "a")) == ["b.bin", "c.json"]
    assert storage.read_json(storage.join(root, "a", "c.json")) == {"x": 1.5}
    storage.remove(storage.join(root, "a"))
    assert storage.names(storage.join(root, "a")) == []
    storage.remove(storage.join(root, "a"))


def test_a_write_that_fails_leaves_the_old_content_and_no_rest(root: str) -> None:
    place = storage.join(root, "x.bin")
    storage.write_bytes(place, b"old")
    with pytest.raises(RuntimeError, match="in the middle"), storage.atomic_writer(place) as stream:
        stream.write(b"new, half of i")
        raise RuntimeError("in the middle")
    assert storage.read_bytes(place) == b"old"
    assert storage.names(root) == ["x.bin"]
    if storage.is_local(root):
        assert os.listdir(root) == ["x.bin"]


def test_compression_is_inferred(tmp_path: Path) -> None:
    place = tmp_path / "x.csv.gz"
    place.write_bytes(gzip.compress(b"hello"))
    with storage.reader(str(place)) as stream:
        assert stream.read() == b"hello"


def test_errors_are_one_line_with_the_name(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nothing\.csv: no such file"):
        storage.read_bytes(str(tmp_path / "nothing.csv"))
    with pytest.raises(StorageError, match="install the fsspec driver"):
        storage.exists("nosuchscheme://x/y")
    bad = tmp_path / "bad.json"
    bad.write_bytes(b"{")
    with pytest.raises(StorageError, match="not valid JSON"):
        storage.read_json(str(bad))


def test_no_space_left(tmp_path: Path) -> None:
    # /dev/full refuses every write with ENOSPC; the writer meets it where a real disk would: when it syncs.
    place = tmp_path / "x.bin"
    with pytest.raises(StorageError, match="no space left while writing"), storage.atomic_writer(str(place)):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    assert os.listdir(tmp_path) == []
