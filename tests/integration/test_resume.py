"""SIGKILL of a training worker, and of the whole job: the same command ends with the same bits, which are those of
torchrun without Ray. Real Ray and kills.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import wandb_files
from clusters import command_line
from corpora import tiny_corpus

from cluster import storage, tracking

STEPS = 150
RECIPE = """
run_dir = "{run}"
steps = {steps}
log_every = 1
eval_every = 50
save_every = 20
[data]
corpus = "{corpus}"
lanes = 8
bptt = 35
[model]
name = "awd-lstm"
embedding = 96
hidden = 160
[optim]
lr = 1e-3 # the order of summation is soon seen where much is learned
[engine]
timeout_seconds = 60
[cluster]
workers = 2
[tracking]
wandb = "offline"
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), train_notes=120)


def start(run: Path, corpus: str, workers: int = 2) -> subprocess.Popen[bytes]:
    recipe = run.parent / f"{run.name}.toml"
    recipe.write_text(RECIPE.format(run=run, corpus=corpus, steps=STEPS))
    command = [sys.executable, "-m", "cluster.cli", "pretrain", str(recipe), f"cluster.workers={workers}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes]) -> str:
    said = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, said
    return said


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in tracking.read(str(run)) if "loss" in line]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while not any(reached >= step for reached, _ in losses(run)):
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline, f"step {step} not reached"
        time.sleep(0.02)


def final_tensors(run: Path) -> list[str]:
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    return [storage.sha256(str(path)) for path in sorted(folder.glob("*.safetensors"))]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    """By torchrun, where there is no Ray: the same bits as with it are wanted."""
    folder = tmp_path_factory.mktemp("unbroken")
    run, recipe = folder / "run", folder / "recipe.toml"
    recipe.write_text(RECIPE.format(run=run, corpus=corpus, steps=STEPS))
    (folder / "ray.py").write_text("raise ImportError('there is no Ray here')\n")
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "pretrain.train", str(recipe)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert (run / "plots/loss.png").exists()
    return run


def training_workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in command_line(child)]


def random_step() -> int:
    """Another step at every run of the tests; printed, so that a failure can be repeated."""
    step = random.SystemRandom().randrange(25, STEPS - 30)
    sys.stdout.write(f"killed at step {step}\n")
    return step


def assert_one_curve(run: Path, unbroken: Path) -> None:
    assert losses(run) == losses(unbroken)  # every loss to the last bit; no step missing or doubled
    assert final_tensors(run) == final_tensors(unbroken)
    assert wandb_files.curve(run, "loss") == dict(losses(run))  # W&B shows the same curve, under one id
    assert len({segment.name for segment in wandb_files.segments(run)}) == 1
    events = [line for line in tracking.read(str(run)) if line.get("event") == "resumed"]
    assert len(events) == 1
    assert events[0]["step"] % 20 == 0
    assert events[0]["step"] <= events[0]["interrupted_at"]


@pytest.mark.slow  # in every run: the demo
def test_kill_of_a_worker(tmp_path: Path, corpus: str, unbroken: Path) -> None:
    run = tmp_path / "run"
    process = start(run, corpus)
    wait_for_step(run, random_step(), process)
    random.SystemRandom().choice(training_workers(process)).send_signal(signal.SIGKILL)
    finish(process)  # Ray Train goes on by itself
    assert_one_curve(run, unbroken)


@pytest.mark.slow  # in every run: without Ray, test_lineage; with it, the demo
def test_kill_of_the_whole_job(tmp_path: Path, corpus: str, unbroken: Path) -> None:
    run = tmp_path / "run"
    process = start(run, corpus)
    wait_for_step(run, random_step(), process)
    assert len(training_workers(process)) == 2
    job = psutil.Process(process.pid)
    tree = [job, *job.children(recursive=True)]  # the command, Ray, the workers: as when the machine is switched off
    for part in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            part.send_signal(signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(tree, timeout=60)[1] == []
    said = finish(start(run, corpus))
    assert "from step" in said
    assert_one_curve(run, unbroken)
    assert "nothing left to do" in finish(start(run, corpus))


@pytest.mark.parametrize("workers", [pytest.param(2, marks=pytest.mark.slow), 0])
def test_sigterm_saves_and_asks_to_be_started_again(tmp_path: Path, corpus: str, unbroken: Path, workers: int) -> None:
    """As a scheduler does before it takes the machine: all is saved at the step reached, nothing is done twice."""
    run = tmp_path / "run"
    process = start(run, corpus, workers)
    wait_for_step(run, random_step(), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[0].decode()
    assert process.returncode == 75, said
    assert "told to stop" in said
    assert "Traceback" not in said
    reached = losses(run)[-1][0]
    assert (run / f"checkpoints/step-{reached:08d}/manifest.json").exists()
    finish(start(run, corpus, workers))
    (event,) = [line for line in tracking.read(str(run)) if line.get("event") == "resumed"]
    assert event["step"] == event["interrupted_at"] == reached
    if workers == 2:
        assert losses(run) == losses(unbroken)
        assert final_tensors(run) == final_tensors(unbroken)
    else:
        for (step, loss), (same_step, other) in zip(losses(run), losses(unbroken), strict=True):
            assert step == same_step
            assert loss == pytest.approx(other, rel=1e-5)
