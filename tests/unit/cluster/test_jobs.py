"""What status reads from a job's log, which jobs are kept, and what a recipe says of its workers."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import config, jobs, keeper, logs
from cluster.config import Place, Section
from cluster.errors import ConfigError
from cluster.placement import ClusterConfig

LOG = """Running entrypoint for job x: python -m cluster.cli pretrain job.toml
rank 0: of 2, on 10.0.0.1 (node 432d55), process 10497
pretrain: 5% step 13  loss 5.739  2,951 tokens/s  checkpoint 0  nodes 2, 23 s left
pretrain: interrupted at step 30, goes on from step 20
pretrain: 22% step 1,052  loss 3.812  4,976 tokens/s  checkpoint 1,040  nodes 1, 196 s left
"""


def test_where_a_job_stands() -> None:
    assert jobs.standing(LOG, 1) == ("pretrain 22%", "1,052", "4,976", "3.812", "1,040", "2", "1")
    ended = LOG + "pretrain: done in 115.3 s; step 2,400  loss 1.876  3,801 tokens/s  checkpoint 2,400  nodes 1\n"
    assert jobs.standing(ended, 0) == ("pretrain done", "2,400", "3,801", "1.876", "2,400", "1", "1")
    assert jobs.standing("read: 20% 12.3 MB/s, 5 s left\n", 0) == ("read 20%", "", "", "", "", "0", "")
    assert jobs.standing("", 0) == ("", "", "", "", "", "0", "")


@pytest.mark.parametrize(
    ("code", "died"),
    [(None, True), (-9, True), (137, True), (143, True), (75, True), (1, False), (2, False), (3, False), (130, False)],
)
def test_what_was_killed_is_submitted_again_and_what_failed_by_itself_is_not(code: int | None, died: bool) -> None:
    assert keeper.died(SimpleNamespace(driver_exit_code=code)) == died  # type: ignore[arg-type]


def test_names() -> None:
    assert [keeper.name_of("pretrain-x", attempt) for attempt in (1, 2)] == ["pretrain-x", "pretrain-x.2"]
    assert jobs._subject(["recipes/mimic3/awd_lstm.toml", "a=b"]) == "mimic3-awd-lstm-"
    assert jobs._subject(["s3://bucket/runs/big one/recipe.toml"]) == "big-one-"
    assert jobs._subject(["out=x"]) == ""


def test_workers() -> None:
    fixed, elastic = ClusterConfig(workers=3), ClusterConfig(workers="4..16")
    assert (fixed.fewest, fixed.most, elastic.fewest, elastic.most) == (3, 3, 4, 16)
    for wrong in (-1, "4", "16..4", "0..2", "4..", "many"):
        with pytest.raises(ConfigError, match=r'give a number of workers, or "4\.\.16"'):
            config.validate(ClusterConfig, {"workers": wrong}, "recipe")


class Inner(Section):
    url: Place = "x"


class Outer(Section):
    run: Place
    other: Place | None = None
    several: Place | dict[Place, float] = "a"
    inner: Inner = Inner()
    name: str = "name"


def test_places_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = config.absolute(Outer(run="s3://bucket/x", several={"a": 0.5, "/b": 0.5}))
    assert found == Outer(
        run="s3://bucket/x", several={f"{tmp_path}/a": 0.5, "/b": 0.5}, inner=Inner(url=f"{tmp_path}/x")
    )


def test_a_worker_says_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(logs, "_elsewhere", None)
    said: list[str] = []
    logs.forward(said.append)
    logs.say("a line")
    assert said == ["a line"]
    assert capsys.readouterr().out == ""
