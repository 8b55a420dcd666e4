from pathlib import Path

import pytest
import wandb
import wandb_files

from cluster import storage, tracking
from cluster.tracking import TrackingConfig

NO_MIRROR = TrackingConfig(wandb="disabled")


def log_steps(run: str, steps: range, resumed: int | None, config: TrackingConfig = NO_MIRROR) -> None:
    with tracking.opened(run, config, "abc123", {}, resumed) as track:
        for step in steps:
            track.log(step=step, loss=1 / (step + 1))
    if config is not NO_MIRROR:
        wandb.teardown()  # every start of a run is a process of its own, with a service of its own


@pytest.mark.parametrize("where", ["local", "memory"])
def test_resume_cuts_later_lines_and_marks_the_interruption(tmp_path: Path, where: str) -> None:
    run = str(tmp_path) if where == "local" else f"memory://{tmp_path.name}"
    log_steps(run, range(1, 8), None)
    log_steps(run, range(6, 10), 5)
    lines = tracking.read(run)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))
    assert [line for line in lines if "event" in line] == [{"step": 5, "event": "resumed", "interrupted_at": 7}]


def test_start_again_without_a_checkpoint_keeps_nothing_but_the_mark(tmp_path: Path) -> None:
    log_steps(str(tmp_path), range(0, 4), None)
    log_steps(str(tmp_path), range(0, 2), None)
    lines = tracking.read(str(tmp_path))
    assert [line["step"] for line in lines if "loss" in line] == [0, 1]
    assert lines[0] == {"step": 0, "event": "resumed", "interrupted_at": 3}


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    log_steps(str(tmp_path), range(1, 3), None)
    with open(tmp_path / tracking.FILE, "a") as stream:
        stream.write('{"step": 3, "lo')
    assert [line["step"] for line in tracking.read(str(tmp_path))] == [1, 2]


def test_a_service_of_an_ancestor_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be gone, or keep the id of a run whose worker was killed."""
    monkeypatch.setenv("WANDB_SERVICE", "3-1-tcp-localhost-9")  # nobody listens there
    log_steps(str(tmp_path), range(1, 4), None, TrackingConfig(wandb="offline"))
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_the_closing_numbers_are_a_summary(tmp_path: Path) -> None:
    tracking.summarize(str(tmp_path), TrackingConfig(wandb="offline"), {"task": "status"}, {"auroc": 0.7})
    wandb.teardown()
    [run] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"auroc" in run.read_bytes()


def test_wandb_offline_mirrors_under_one_id(tmp_path: Path) -> None:
    offline = TrackingConfig(wandb="offline")
    log_steps(str(tmp_path), range(1, 4), None, offline)
    log_steps(str(tmp_path), range(3, 6), 2, offline)
    segments = wandb_files.segments(tmp_path)
    assert [segment.name for segment in segments] == ["run-abc123.wandb"] * 2
    assert wandb_files.curve(tmp_path, "loss") == {step: 1 / (step + 1) for step in range(1, 6)}


def test_wandb_gets_again_what_a_kill_took_from_it(tmp_path: Path) -> None:
    log_steps(str(tmp_path), range(1, 8), None)  # metrics.jsonl has these lines, W&B nothing of them
    log_steps(str(tmp_path), range(6, 9), 5, TrackingConfig(wandb="offline"))
    assert wandb_files.curve(tmp_path, "loss") == {step: 1 / (step + 1) for step in range(1, 9)}


def test_remote_metrics_are_there_after_a_flush(tmp_path: Path) -> None:
    run = f"memory://{tmp_path.name}/flushed"
    with tracking.opened(run, NO_MIRROR, "abc", {}, None) as track:
        track.log(step=1, loss=2.0)
        track.flush_remote()
        assert tracking.read(run) == [{"step": 1, "loss": 2.0}]
    assert storage.exists(storage.join(run, tracking.FILE))
