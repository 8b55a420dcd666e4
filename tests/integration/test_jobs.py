"""submit, status, logs, stop against a real Ray cluster on loopback."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a user of a one-node cluster with token authentication."""
    folder = tmp_path_factory.mktemp("ray")
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    port, dashboard, client = free_ports(3)
    env = dict(os.environ, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_USAGE_STATS_ENABLED="0")
    ray = Path(sys.executable).with_name("ray")
    env["PATH"] = f"{ray.parent}{os.pathsep}{env['PATH']}"  # jobs run the `python` of the node, as in an activated venv
    command = [str(ray), "start", "--head", "--block", "--num-cpus=2", f"--port={port}", "--node-ip-address=127.0.0.1"]
    # The agent's port is fixed by default: beside another Ray on this machine the node would take no jobs.
    command += ["--dashboard-agent-listen-port=0"]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    head = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while launch(env, "status").returncode != 0:
            assert head.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, launch(env, "status").stderr
            time.sleep(1)
        yield env
    finally:
        tree = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in tree:
            process.kill()
        psutil.wait_procs(tree, timeout=30)


def launch(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "launch.sh", *words], env=env, capture_output=True, text=True)


def submit(env: dict[str, str], *words: str) -> str:
    done = launch(env, "submit", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1].rstrip(";")


def state(env: dict[str, str], job: str) -> str:
    done = launch(env, "status", job)
    assert done.returncode == 0, done.stderr
    return next(
        word for word in done.stdout.split() if word in ("PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED")
    )


def wait_until(env: dict[str, str], job: str, *states: str) -> str:
    deadline = time.monotonic() + 180
    while (now := state(env, job)) not in states:
        assert time.monotonic() < deadline, f"{job} is still {now}\n{launch(env, 'logs', job).stdout}"
        time.sleep(2)  # a look takes a CPU from the job
    return now


def test_a_job_from_submit_to_logs(env: dict[str, str], tmp_path: Path) -> None:
    job = submit(env, "hospital", f"out={tmp_path / 'hospital'}", "patients=5")
    assert job.startswith("hospital-")
    assert wait_until(env, job, "SUCCEEDED", "FAILED") == "SUCCEEDED", launch(env, "logs", job).stdout
    assert "synthetic hospital in" in launch(env, "logs", job).stdout
    assert (tmp_path / "hospital" / "NOTEEVENTS.csv.gz").exists()
    assert job in launch(env, "status").stdout


def test_shard_as_a_job(env: dict[str, str], tmp_path: Path) -> None:
    """Jobs join the cluster they run on."""
    shards_of(env, tmp_path)


@pytest.mark.slow
def test_pretrain_as_a_job(env: dict[str, str], tmp_path: Path) -> None:
    """Two Ray Train workers under DeepSpeed."""
    shards, run = shards_of(env, tmp_path), tmp_path / "run"
    small = ["epochs=0.05", "model.hidden=32", "model.embedding=24", "tracking.wandb=disabled"]
    job = submit(env, "pretrain", "recipes/demo/awd_lstm.toml", f"data.corpus={shards}", f"run_dir={run}", *small)
    assert wait_until(env, job, "SUCCEEDED", "FAILED") == "SUCCEEDED", launch(env, "logs", job).stdout
    assert "loss" in (run / "metrics.jsonl").read_text()


def shards_of(env: dict[str, str], folder: Path) -> Path:
    """Shards of a small hospital, made by a job."""
    hospital, shards = folder / "hospital", folder / "shards"
    assert launch(env, "hospital", f"out={hospital}", "patients=40").returncode == 0
    words = ["shard", "recipes/demo/shard.toml", f"input={hospital}/NOTEEVENTS.csv.gz", f"output={shards}"]
    job = submit(env, *words, "tokenizer.vocab_size=600")
    assert wait_until(env, job, "SUCCEEDED", "FAILED") == "SUCCEEDED", launch(env, "logs", job).stdout
    assert (shards / "manifest.json").exists()
    return shards


def test_a_failing_job_says_why_and_a_running_one_can_be_stopped(env: dict[str, str], tmp_path: Path) -> None:
    failing = submit(env, "shard", "recipes/demo/shard.toml", f"input={tmp_path}/nothing.csv")
    running = submit(env, "hospital", f"out={tmp_path / 'large'}", "patients=100000000")
    assert failing.startswith("shard-demo-shard-")
    wait_until(env, running, "RUNNING")
    assert launch(env, "stop", running).returncode == 0
    assert wait_until(env, running, "STOPPED", "SUCCEEDED", "FAILED") == "STOPPED"
    assert not (tmp_path / "large" / "NOTEEVENTS.csv.gz").exists()
    assert wait_until(env, failing, "SUCCEEDED", "FAILED") == "FAILED"
    assert "nothing.csv: no such file" in launch(env, "logs", failing).stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["submit"], "submit what?"),
        (["submit", "hospitl"], "submit what?"),
        (["logs", "nothing"], "nothing: give the name of one job"),
        (["status", "nothing"], "the cluster knows no such job"),
        (["status", "cluster=http://127.0.0.1:1"], "no Ray cluster answers there"),
    ],
)
def test_mistakes_are_one_line(env: dict[str, str], words: list[str], says: str) -> None:
    done = launch(env, *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
