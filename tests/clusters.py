"""Ray clusters of one or several nodes on this machine, started as a user starts them and killed as machines die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ports import free_port

ROOT = Path(__file__).resolve().parents[1]
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")


def command_line(process: psutil.Process) -> str:
    """The words of its command line; none of a process that has ended in the meantime, or is another user's."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return " ".join(process.cmdline())
    return ""


class Cluster:
    """A head by `./launch.sh up`, and further nodes that join it. `env` is the environment of its user."""

    def __init__(self, folder: Path, head_cpus: int, host: str = "127.0.0.1", **more: str):
        self.folder, self.host = folder, host
        self.port, dashboard = free_port(), free_port()
        self.env = dict(
            os.environ,
            HOME=str(folder),  # Ray's token lies there
            RAY_API_SERVER_ADDRESS=f"http://{host}:{dashboard}",
            OMP_NUM_THREADS="1",
            **more,
        )
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            self.env.pop(name, None)
        self.said = self.up("head", head_cpus, f"host={host}", f"port={self.port}", f"dashboard_port={dashboard}")

    def up(self, name: str, cpus: int, *words: str, within: tuple[str, ...] = (), **more: str) -> str:
        """Starts a node, perhaps `within` the command of a namespace; returns what `up` said."""
        command = [*within, str(ROOT / "launch.sh"), "up", f"folder={self.folder / name}", f"workers={cpus}", *words]
        done = subprocess.run(command, env=self.env | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def join(self, name: str, cpus: int = 1) -> None:
        """One more node."""
        self.up(name, cpus, f"join={self.host}:{self.port}", f"host={self.host}")

    def processes(self, name: str) -> list[psutil.Process]:
        """All processes of a node, its own first."""
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            node = psutil.Process(json.loads((self.folder / name / "node.json").read_text())["pid"])
            return [node, *node.children(recursive=True)]
        return []

    def kill(self, name: str) -> None:
        """SIGKILL of all processes of a node at once, as a power cut does it."""
        tree = self.processes(name)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)  # so that none can tell another
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=30)
        (self.folder / name / "node.json").unlink(missing_ok=True)

    def named(self, *titles: str) -> list[psutil.Process]:
        """Processes of any node whose command line holds one of these texts."""
        found = []
        for name in [path.parent.name for path in self.folder.glob("*/node.json")]:
            for process in self.processes(name):
                line = command_line(process)
                if any(title in line for title in titles):
                    found.append(process)
        return found

    def launch(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A verb, as a user runs it."""
        return subprocess.run([ROOT / "launch.sh", *words], env=self.env | more, capture_output=True, text=True)

    def submit(self, *words: str, **more: str) -> str:
        """Submits a job; returns its name."""
        done = self.launch("submit", *words, **more)
        assert done.returncode == 0, done.stderr
        found = re.search(r"submitted (\S+);", done.stdout)
        assert found, done.stdout
        return found[1]

    def row(self, job: str) -> list[str]:
        """The job's row of `status`: job, verb, state, at, step, tokens/s, loss, checkpoint, restarts, nodes."""
        done = self.launch("status", job)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if job in line)
        return [cell.strip() for cell in line.strip("│┃ ").split("│")]

    def log(self, job: str) -> str:
        """What the job has printed."""
        return self.launch("logs", job).stdout

    def state(self, job: str) -> str:
        """The state of the job's newest attempt, asked of Ray itself: `status` would take a CPU from the job."""
        token = (self.folder / ".ray" / "auth_token").read_text()
        address = f"{self.env['RAY_API_SERVER_ADDRESS']}/api/jobs/"
        asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(asked, timeout=60) as found:
            attempts = [one for one in json.load(found) if (one["metadata"] or {}).get("job") == job]
        return str(max(attempts, key=lambda one: one["start_time"] or 0)["status"])

    def wait(self, job: str, *states: str, seconds: float = 240) -> str:
        """Waits for a state; returns it as `status` has it."""
        deadline = time.monotonic() + seconds
        while (now := self.state(job)) not in (states or TERMINAL):
            assert time.monotonic() < deadline, f"{job} is still {now}\n{self.log(job)}"
            time.sleep(0.5)
        return self.row(job)[2]

    def end(self) -> None:
        """Ends every node."""
        for path in self.folder.glob("*/node.json"):
            self.kill(path.parent.name)


def own_address() -> str:
    """An address of this machine that is not loopback: Ray lets no second node join there."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return address.address
    pytest.skip("this machine has no address but loopback")


@contextlib.contextmanager
def cluster(folder: Path, head_cpus: int, host: str = "127.0.0.1", **more: str) -> Iterator[Cluster]:
    """A cluster for the length of a block."""
    made = None
    try:
        made = Cluster(folder, head_cpus, host, **more)
        yield made
    finally:
        if made is not None:
            made.end()
