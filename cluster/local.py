"""`./launch.sh up` and `down`: a Ray cluster on this machine, or this machine as one more of a cluster.

Closed by default: everything listens on loopback unless `host` names another address of this machine, and nobody
without the token submits or reads a job. `down` ends the processes that `up` started, by their id, and no others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from pydantic import Field

from cluster import logs, storage
from cluster.config import Section, load
from cluster.errors import ClusterError, ConfigError
from cluster.token import make_token, token_file, use_token

STATE, LOG = "node.json", "ray.log"
LOOPBACK = "127.0.0.1"
UP_WITHIN_SECONDS = 120
DOWN_WITHIN_SECONDS = 20
ANSWERS_WITHIN_SECONDS = 5


class UpConfig(Section):
    """Keys of `up`."""

    workers: int | None = Field(None, ge=1, description="CPUs of this machine that jobs may take; all if not given")
    host: str = Field(LOOPBACK, description="address of this machine on which the cluster listens")
    port: int = Field(6379, ge=1, le=65535)
    dashboard_port: int = Field(8265, ge=1, le=65535, description="of the Jobs API and Ray's dashboard")
    join: str | None = Field(None, description="HOST:PORT of a cluster that this machine joins")
    folder: str = Field("runs/cluster", description="where its process id and its log are kept")


class DownConfig(Section):
    """Keys of `down`."""

    folder: str = "runs/cluster"


def up(args: list[str]) -> None:
    """Verb `up`."""
    asked = load(UpConfig, args, None)
    state = storage.join(asked.folder, STATE)
    if storage.exists(state) and (running := _process(storage.read_json(state))):
        raise ConfigError(f"{asked.folder}: a cluster is up already (process {running.pid}); ./launch.sh down ends it")
    joining = asked.join is not None
    if not joining:
        for port in (asked.port, asked.dashboard_port):
            _free(asked.host, port)
    elif str(asked.join).startswith(("127.", "localhost", "[::1]")):
        raise ConfigError(
            f"join={asked.join}: a cluster on loopback is closed; start it with ./launch.sh up host=ADDRESS"
        )
    elif not token_file().exists():
        raise ConfigError(f"{token_file()}: no token; copy the file of that name from the cluster's head (mode 0600)")
    else:
        _reach(str(asked.join))
    token = make_token()
    use_token()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
    command += ["--dashboard-agent-listen-port=0"]  # it is fixed by default: a second node on a machine takes no jobs
    if joining:
        command += [f"--address={asked.join}"]
        if asked.host != LOOPBACK:
            command += [f"--node-ip-address={asked.host}"]
    else:
        command += ["--head", f"--node-ip-address={asked.host}", f"--port={asked.port}"]
        # Jobs find their cluster by a file in this folder: two clusters of a machine must not share it.
        command += [f"--temp-dir={Path(tempfile.gettempdir()) / f'chartlm-ray-{os.getuid()}-{asked.port}'}"]
        command += [f"--ray-client-server-port={_free(asked.host, 0)}"]  # cannot be left out; 10001 may be another's
        command += [f"--dashboard-host={asked.host}", f"--dashboard-port={asked.dashboard_port}"]
    if asked.workers is not None:
        command += [f"--num-cpus={asked.workers}"]
    log = storage.local_path(storage.join(asked.folder, LOG))
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = _environment(joining or asked.host != LOOPBACK)
    _start(command, environment, state, log, None if joining else f"http://{asked.host}:{asked.dashboard_port}")
    if joining:
        logs.say(f"this machine has joined {asked.join}; ./launch.sh down takes it out again")
        return
    logs.say(f"Ray is up on http://{asked.host}:{asked.dashboard_port}; ./launch.sh submit runs verbs there")
    logs.say(f"token: {token} (whoever has it may run code here)")
    if asked.host == LOOPBACK:
        logs.say("only this machine reaches it; up host=ADDRESS lets others join")
    else:
        logs.say("another machine joins by: copy the token file there (mode 0600), then")
        logs.say(f"  ./launch.sh up join={asked.host}:{asked.port} host=ITS_ADDRESS")
    logs.say("./launch.sh down ends it")


def _environment(open_to_others: bool) -> dict[str, str]:
    """That of a node: its jobs run the `python` of this installation, and ask for the token."""
    binaries = str(Path(sys.executable).parent)
    # Ray takes 127.0.0.1 for a slip, and would listen on every address of this machine, but for this.
    closed = {} if open_to_others else {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    return closed | dict(
        os.environ,
        RAY_AUTH_MODE="token",
        RAY_USAGE_STATS_ENABLED="0",
        PATH=f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
    )


def _free(host: str, port: int) -> int:
    """The port, or any for 0. Raises ConfigError where another process listens on it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise ConfigError(f"{host}:{port}: {exc.strerror}; give another host=, port= or dashboard_port=") from None
        return int(probe.getsockname()[1])


def _reach(address: str) -> None:
    """Raises ConfigError where no head listens: Ray would ask for minutes, and not say what is wrong."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWERS_WITHIN_SECONDS).close()
    except (OSError, ValueError, OverflowError) as exc:
        raise ConfigError(
            f"join={address}: {getattr(exc, 'strerror', None) or exc}; give HOST:PORT as ./launch.sh up said on the "
            "cluster's head, and see that it is still up"
        ) from None


def _start(command: list[str], environment: dict[str, str], state: str, log: Path, api: str | None) -> None:
    """Returns when the node takes work: a head when its Jobs API answers as well.

    A node whose processes were too slow for Ray is started again while there is time. Raises ClusterError, the node
    ended, where it does not come up.
    """
    from cluster import jobs, ray_runtime  # they import Ray

    deadline = time.monotonic() + UP_WITHIN_SECONDS
    with logs.progress("up", UP_WITHIN_SECONDS) as advance:
        while True:
            with log.open("wb") as out:
                node = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
            storage.write_json(state, {"pid": node.pid, "started": psutil.Process(node.pid).create_time()})
            while node.poll() is None and time.monotonic() < deadline:
                # The API answers before the node stands, and again when it has gone.
                if b"Ray runtime started" in log.read_bytes() and (api is None or jobs.answers(api)):
                    return
                time.sleep(0.5)
                advance(UP_WITHIN_SECONDS - (deadline - time.monotonic()), "")
            _end(node.pid)
            if ray_runtime.TOO_SLOW not in log.read_text(errors="replace") or time.monotonic() >= deadline:
                break
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise ClusterError(f"Ray did not come up ({lines[-1] if lines else 'no output'}); all it said is in {log}")


def _process(state: dict[str, Any]) -> psutil.Process | None:
    """The process of a state file, if it still lives (ids are used again)."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(state["pid"])
        if abs(process.create_time() - state["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def down(args: list[str]) -> None:
    """Verb `down`."""
    folder = load(DownConfig, args, None).folder
    state = storage.join(folder, STATE)
    process = _process(storage.read_json(state)) if storage.exists(state) else None
    if process is None:
        raise ConfigError(f"{folder}: no cluster of ./launch.sh up runs here; give the folder= it was started with")
    _end(process.pid)
    storage.remove(state)
    logs.say("Ray is down; jobs that ran go on when they are submitted again")


def _end(pid: int) -> None:
    """Ends a node and all it has started: asked first (`ray start --block` ends its own), killed after a while."""
    with contextlib.suppress(psutil.NoSuchProcess):
        node = psutil.Process(pid)
        tree = [node, *node.children(recursive=True)]
        node.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(tree, timeout=DOWN_WITHIN_SECONDS)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=DOWN_WITHIN_SECONDS)
