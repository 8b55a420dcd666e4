"""Runs a plain function on several gloo ranks of this machine, each a fresh process, as torchrun would."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
# Left by os._exit: when Python finalizes, threads of torch's that wait for the interpreter can abort the process.
RUNNER = "import os, pickle, sys; f, a = pickle.load(sys.stdin.buffer); f(*a); sys.stdout.flush(); os._exit(0)"


def run_on_ranks(world: int, function: Callable[..., None], *args: Any, timeout_seconds: float = 180) -> None:
    """Calls `function(*args)` on every rank; fails with what a failing rank printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        env = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
        env |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(world)}
        env["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        process = subprocess.Popen(
            [sys.executable, "-c", RUNNER],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((function, args)))
        process.stdin.close()
        process.stdin = None
        processes.append(process)
    try:
        said = [process.communicate(timeout=timeout_seconds)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank} of {world}:\n{said[rank][-4000:]}"
