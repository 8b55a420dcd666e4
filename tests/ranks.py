"""Runs a plain function on several gloo ranks of this machine, each a process of its own, as torchrun would.

The processes are forked from one that has imported everything and done nothing: importing torch and DeepSpeed takes
longer than most of what is run here.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from ports import free_port

TESTS = Path(__file__).resolve().parent
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["deepspeed", "torch._dynamo", "pandas", "matplotlib.figure", "pretrain.train", "pytest", "ranks"]
)


def _rank(environment: dict[str, str], output: str, called: bytes) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "wb") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    status = 1
    try:
        function, args = pickle.loads(called)
        function(*args)
        status = 0
    finally:
        if status:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # When Python finalizes, threads of torch's that wait for the interpreter can abort the process.
        os._exit(status)


def run_on_ranks(world: int, function: Callable[..., None], *args: Any, timeout_seconds: float = 180) -> None:
    """Calls `function(*args)` on every rank; fails with what a failing rank printed."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    common |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(world)}
    common["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    with mock.patch.dict(os.environ, common):  # what the forked-from process, begun at the first call, imports with
        multiprocessing.forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(world)]
        processes = []
        for rank, output in enumerate(outputs):
            environment = dict(os.environ) | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            called = pickle.dumps((function, args))
            processes.append(_FORKS.Process(target=_rank, args=(environment, str(output), called)))
            processes[-1].start()
        deadline = time.monotonic() + timeout_seconds
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            for process in processes:
                process.kill()
                process.join()
        said = [output.read_text(errors="replace") if output.exists() else "" for output in outputs]
    for rank, process in enumerate(processes):
        how = f"took longer than {timeout_seconds} s" if rank in late else f"ended with {process.exitcode}"
        assert process.exitcode == 0, f"rank {rank} of {world} {how}:\n{said[rank][-4000:]}"
