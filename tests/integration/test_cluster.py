"""Machines, workers, drivers and Ray's own watchmen die or hang under a job: it goes on by itself, nothing is lost.

Real raylets on this machine, each a node; real SIGKILL and SIGSTOP.
"""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import psutil
import pytest
import wandb_files
from clusters import ROOT, Cluster, cluster, own_address
from corpora import tiny_corpus
from object_store import object_store

from cluster import tracking
from pretrain import checkpoint
from sharding.shards import Corpus

STEPS = 1000
RECIPE = """
steps = {steps}
log_every = 1
eval_every = 250
save_every = 25
[data]
corpus = "{corpus}"
lanes = 8
bptt = 35
[model]
name = "awd-lstm"
embedding = 96
hidden = 160
[optim]
schedule = "constant" # a longer run begins like a shorter one
warmup = 0.0
lr = 2e-4 # the order of summation is soon seen where much is learned
[engine]
timeout_seconds = 60
[cluster]
workers = "1..3"
max_failures = 3
start_seconds = 10
hang_seconds = 10
resize_seconds = 5
[tracking]
wandb = "offline"
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), train_notes=120)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> str:
    place = tmp_path_factory.mktemp("recipe") / "small.toml"
    place.write_text(RECIPE.format(corpus=corpus, steps=STEPS))
    return str(place)


Undisturbed = Callable[[int], dict[int, float]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe: str) -> Undisturbed:
    """The first losses of the same run on one worker that nobody disturbs, without Ray."""

    @functools.cache
    def first(steps: int) -> dict[int, float]:
        run = tmp_path_factory.mktemp("undisturbed") / "run"
        words = ["pretrain", recipe, f"run_dir={run}", f"steps={steps}", "workers=0", "tracking.wandb=disabled"]
        subprocess.run([sys.executable, "-m", "cluster.cli", *words], cwd=ROOT, check=True)
        return losses(run)

    return first


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("ray"), head_cpus=1, host=own_address()) as made:
        yield made


@pytest.fixture(autouse=True)
def only_the_head_stays(ray: Cluster) -> Iterator[None]:
    yield
    for node in {path.parent.name for path in ray.folder.glob("*/node.json")} - {"head"}:
        ray.kill(node)


def losses(run: Path) -> dict[int, float]:
    steps = [(line["step"], line["loss"]) for line in tracking.read(str(run)) if "loss" in line]
    assert len(dict(steps)) == len(steps)  # none twice
    return dict(steps)


def widths(run: Path) -> list[int]:
    """Numbers of workers in the order in which they trained."""
    seen: list[int] = []
    for line in tracking.read(str(run)):
        if "workers" in line and seen[-1:] != [line["workers"]]:
            seen.append(line["workers"])
    return seen


def reach(ray: Cluster, job: str, run: Path, step: int, workers: int | None = None) -> None:
    """Returns when the run has come to a step, with so many workers."""
    deadline = time.monotonic() + 300
    while True:
        lines = [line for line in tracking.read(str(run)) if "workers" in line]
        if lines and lines[-1]["step"] >= step and workers in (None, lines[-1]["workers"]):
            return
        assert time.monotonic() < deadline, ray.log(job)
        time.sleep(0.1)


def assert_nothing_is_lost(run: Path, undisturbed: Undisturbed, steps: int = STEPS) -> None:
    """One curve without gap or repeat, in the metrics and in W&B, the same as that of the undisturbed run."""
    found = losses(run)
    assert list(found) == list(range(1, steps + 1))
    assert found == pytest.approx(undisturbed(steps), rel=1e-5)
    assert wandb_files.curve(run, "loss") == pytest.approx(found, rel=1e-5)
    assert len({segment.name for segment in wandb_files.segments(run)}) == 1


def test_a_machine_dies(ray: Cluster, tmp_path: Path, recipe: str, undisturbed: Undisturbed) -> None:
    """Two nodes, one worker each: one dies, and the run goes on with the other by itself."""
    ray.join("a")
    run = tmp_path / "run"
    job = ray.submit("pretrain", recipe, f"run_dir={run}")
    reach(ray, job, run, 30, workers=2)
    ray.kill("a")
    reach(ray, job, run, 60, workers=1)
    assert ray.launch("stop", job).returncode == 0
    assert_nothing_is_lost(run, undisturbed, steps=max(losses(run)))
    assert ray.row(job)[8:] == ["1", "1"]


@pytest.mark.cluster
def test_a_machine_dies_and_another_comes(ray: Cluster, tmp_path: Path, recipe: str, undisturbed: Undisturbed) -> None:
    """Three nodes, one worker each: one dies, the run goes on with two; a node comes, and it goes on with three.

    Ray looks for machines every 20 s; the rest of the run would show no more.
    """
    ray.join("a")
    ray.join("b")
    run = tmp_path / "run"
    job = ray.submit("pretrain", recipe, f"run_dir={run}")
    reach(ray, job, run, 30, workers=3)
    ray.kill("b")
    reach(ray, job, run, 31, workers=2)
    ray.join("c")
    reach(ray, job, run, 32, workers=3)
    assert ray.launch("stop", job).returncode == 0
    log = ray.log(job)
    assert widths(run) == [3, 2, 3], log
    assert_nothing_is_lost(run, undisturbed, steps=max(losses(run)))
    assert " lost: " in log
    assert ray.row(job)[8:] == ["2", "3"]


WHO = {
    "worker": ["ray::RayTrainWorker"],
    "driver": ["cluster.cli pretrain job.toml"],
    "watchman": ["ray::_ray_internal_job_actor", "ray::JobSupervisor"],
}


@pytest.mark.cluster
@pytest.mark.parametrize("who", WHO)
def test_a_process_is_killed(ray: Cluster, tmp_path: Path, recipe: str, undisturbed: Undisturbed, who: str) -> None:
    """A training worker, the driver, and the process of Ray's that watches over the driver."""
    run = tmp_path / "run"
    job = ray.submit("pretrain", recipe, f"run_dir={run}", "workers=1")
    reach(ray, job, run, 45)
    victims = ray.named(*WHO[who])
    assert victims
    for victim in victims:
        victim.kill()
    deadline = time.monotonic() + 180
    while STEPS not in losses(run):
        assert time.monotonic() < deadline, ray.log(job)
        time.sleep(1)
    assert ray.wait(job) == "SUCCEEDED", ray.log(job)
    assert_nothing_is_lost(run, undisturbed)
    assert ray.row(job)[8] != "0"


@pytest.mark.cluster
def test_a_worker_that_hangs_is_named_and_replaced(
    ray: Cluster, tmp_path: Path, recipe: str, undisturbed: Undisturbed
) -> None:
    run = tmp_path / "run"
    ray.join("d")
    job = ray.submit("pretrain", recipe, f"run_dir={run}", "workers=2")
    reach(ray, job, run, 30, workers=2)
    (line,) = [line for line in ray.log(job).splitlines() if line.startswith("rank 1: of 2")]
    hung = psutil.Process(int(line.rsplit(" ", 1)[-1]))
    hung.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    while "rank 1: lost: it was silent for 10 s" not in ray.log(job):
        assert time.monotonic() < began + 60, ray.log(job)
        time.sleep(1)
    assert ray.wait(job) == "SUCCEEDED", ray.log(job)
    assert not psutil.pid_exists(hung.pid)
    assert_nothing_is_lost(run, undisturbed)


@pytest.mark.cluster
def test_a_machine_dies_while_notes_are_sharded(ray: Cluster, tmp_path: Path) -> None:
    """The same bytes come out."""
    ray.join("e", cpus=2)
    assert ray.launch("hospital", f"out={tmp_path / 'hospital'}", "patients=1500").returncode == 0
    words = ["shard", "recipes/demo/shard.toml", f"input={tmp_path}/hospital/NOTEEVENTS.csv.gz", "block_mib=0.1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ray.wait(ray.submit(*words, f"output={whole}")) == "SUCCEEDED"
    job = ray.submit(*words, f"output={broken}")
    deadline = time.monotonic() + 120
    while len(list(broken.glob("work/*"))) < 20:
        assert time.monotonic() < deadline, ray.log(job)
        time.sleep(0.05)
    ray.kill("e")
    assert ray.wait(job) == "SUCCEEDED", ray.log(job)
    one, two = Corpus.open(str(whole)), Corpus.open(str(broken))
    assert one.manifest == two.manifest


@pytest.mark.cluster
def test_without_a_shared_file_system(
    ray: Cluster, tmp_path: Path, recipe: str, corpus: str, undisturbed: Undisturbed
) -> None:
    """Shards and run directory in an object store; a machine dies on the way."""
    with object_store("bucket") as environment:
        fsspec.filesystem("s3").put(corpus, "s3://bucket/shards", recursive=True)
        ray.join("f")
        words = ["data.corpus=s3://bucket/shards", "run_dir=s3://bucket/run", "tracking.wandb=disabled"]
        job = ray.submit("pretrain", recipe, *words, **environment)
        deadline = time.monotonic() + 180
        while (checkpoint.newest_step("s3://bucket/run") or 0) < 60:
            assert time.monotonic() < deadline, ray.log(job)
            time.sleep(1)
        ray.kill("f")
        assert ray.wait(job) == "SUCCEEDED", ray.log(job)
        found = {line["step"]: line["loss"] for line in tracking.read("s3://bucket/run") if "loss" in line}
        assert found == pytest.approx(undisturbed(STEPS), rel=1e-5)
        assert "secret" not in ray.log(job)


@pytest.mark.cluster
def test_a_machine_that_is_announced_to_go(ray: Cluster, tmp_path: Path, recipe: str, undisturbed: Undisturbed) -> None:
    """A notice of preemption has the run saved right then, out of turn; when the machine is gone it goes on."""
    ray.join("g")
    run = tmp_path / "run"
    job = ray.submit("pretrain", recipe, f"run_dir={run}", "keep_every=1", "steps=20000")
    reach(ray, job, run, 30, workers=2)
    (raylet,) = [p for p in ray.processes("g") if p.name() == "raylet"]
    (node,) = [word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--node_id=")]
    drain = ["drain-node", f"--address={ray.host}:{ray.port}", f"--node-id={node}"]
    drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=30"]
    subprocess.run(
        [Path(sys.executable).with_name("ray"), *drain], env=ray.env | {"RAY_AUTH_MODE": "token"}, check=True
    )
    deadline = time.monotonic() + 60
    while all(step % 25 == 0 for step in checkpoint.steps_of(str(run))):
        assert time.monotonic() < deadline, ray.log(job)
        time.sleep(0.2)
    reached = max(losses(run))
    ray.kill("g")
    reach(ray, job, run, reached + 1, workers=1)
    assert ray.launch("stop", job).returncode == 0
    found = losses(run)
    assert list(found) == list(range(1, max(found) + 1))
    compared = min(STEPS, max(found))
    assert {step: found[step] for step in range(1, compared + 1)} == pytest.approx(undisturbed(compared), rel=1e-5)


@pytest.mark.cluster
def test_two_networks_and_a_cut_cable(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, recipe: str, undisturbed: Undisturbed
) -> None:
    """The second machine has a network of its own; then the cable between them is cut, and nobody says goodbye."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    name, here, there = f"chartlm-{os.getpid()}", f"ch{os.getpid()}a", f"ch{os.getpid()}b"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        ip("addr", "add", "10.77.0.1/24", "dev", here)
        ip("link", "set", here, "up")
        ip("-n", name, "addr", "add", "10.77.0.2/24", "dev", there)
        ip("-n", name, "link", "set", there, "up")
        ip("-n", name, "link", "set", "lo", "up")
        # A silent machine is given up after 3 looks, a second apart (by default it takes 5, 3 s apart).
        patience = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
        folder = tmp_path_factory.mktemp("ray")
        with cluster(folder, 1, "10.77.0.1", GLOO_SOCKET_IFNAME=here, **patience) as ray:
            words = (f"join=10.77.0.1:{ray.port}", "host=10.77.0.2")
            ray.up("far", 1, *words, within=("ip", "netns", "exec", name), GLOO_SOCKET_IFNAME=there)
            run = tmp_path / "run"
            job = ray.submit("pretrain", recipe, f"run_dir={run}")
            reach(ray, job, run, 30, workers=2)
            assert "on 10.77.0.2" in ray.log(job)
            ip("link", "set", here, "down")
            ip("addr", "add", "10.77.0.1/24", "dev", "lo")  # the head keeps its address
            reach(ray, job, run, 31, workers=1)
            assert ray.wait(job) == "SUCCEEDED", ray.log(job)
            assert_nothing_is_lost(run, undisturbed)
    finally:
        subprocess.run(["ip", "addr", "del", "10.77.0.1/24", "dev", "lo"], stderr=subprocess.DEVNULL)
        ip("netns", "del", name)
