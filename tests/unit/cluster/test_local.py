"""When a node counts as up, and what becomes of one that does not come up. The nodes are scripts with Ray's words."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from cluster import local, ray_runtime, storage
from cluster.errors import ClusterError

# Too slow for Ray as often as the first word says, then up, or what the second word says.
NODE = """
import pathlib, sys, time
tries = pathlib.Path("tries")
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if len(tries.read_text()) <= int(sys.argv[1]):
    sys.exit("Exception: The current node timed out during startup. This could happen because")
print(sys.argv[2], flush=True)
time.sleep(float(sys.argv[3]))
"""


def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.chdir(tmp_path)
    state = str(tmp_path / local.STATE)
    local._start([sys.executable, "-c", NODE, *words], dict(os.environ), state, tmp_path / local.LOG, None)
    return state


def test_a_node_too_slow_for_ray_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = local._process(storage.read_json(start(tmp_path, monkeypatch, "2", "Ray runtime started.", "60")))
    assert node is not None  # the third, and the state file names it
    assert (tmp_path / "tries").read_text() == "xxx"
    node.send_signal(signal.SIGKILL)
    psutil.wait_procs([node])


def test_a_node_that_fails_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"Ray did not come up \(no such option\); all it said is in .*ray\.log"):
        start(tmp_path, monkeypatch, "0", "no such option", "0")
    assert (tmp_path / "tries").read_text() == "x"


def test_a_node_that_never_stands_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "UP_WITHIN_SECONDS", 2)
    with pytest.raises(ClusterError, match="Ray did not come up"):
        start(tmp_path, monkeypatch, "0", "Local node IP: 127.0.0.1", "60")
    assert local._process(storage.read_json(str(tmp_path / local.STATE))) is None


def test_a_ray_too_slow_for_itself_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_runtime.ray, "init", init)
    with pytest.raises(ClusterError, match="Ray did not start within the 30 s it gives itself"):
        ray_runtime.start()
