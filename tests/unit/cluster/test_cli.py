import os
import re
import subprocess
from pathlib import Path

import pytest

from cluster import cli
from cluster.errors import TrainingError

ROOT = Path(__file__).resolve().parents[3]


def test_every_verb_of_the_table_can_be_imported() -> None:
    import importlib

    for name, verb in cli.VERBS.items():
        if verb.module is not None:
            assert callable(getattr(importlib.import_module(verb.module), verb.function)), name


def test_launch_alone_prints_every_verb() -> None:
    out = subprocess.run([ROOT / "launch.sh"], capture_output=True, text=True, check=True).stdout
    for name in cli.VERBS:
        assert f"./launch.sh {name}" in out


def test_launch_sets_up_for_every_verb() -> None:
    (verbs,) = re.findall(
        r"^  ([a-z |-]+)\)\n    set_up\n    exec .* -m cluster\.cli", (ROOT / "launch.sh").read_text(), re.M
    )
    assert verbs.split(" | ") == [name for name, verb in cli.VERBS.items() if verb.module is not None]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["pretrian"], "no verb 'pretrian'; the nearest is 'pretrain'"),
        (["pretrain", "nowhere.toml"], "nowhere.toml: no such file"),
        (["shard", "out_put=x"], "no key 'out_put'; the nearest is 'output'"),
        (["evaluate", "nowhere"], "nowhere: is not a run directory"),
        (["demo", "nowhere"], "nowhere: has no"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(args: list[str], says: str, tmp_path: Path) -> None:
    done = subprocess.run([ROOT / "launch.sh", *args], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_exit_code_of_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: list[str]) -> None:
        raise TrainingError("the loss\nis not finite")

    import pretrain.train

    monkeypatch.setattr(pretrain.train, "main", fail)
    with pytest.raises(SystemExit) as caught:
        cli.run_verb("pretrain", [])
    assert caught.value.code == 3
    assert capsys.readouterr().err == "chartlm: the loss is not finite\n"


def test_threads_wait_a_little_or_as_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "put back afterwards")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    cli.settle_threads()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("PASSIVE", "7")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    cli.settle_threads()
    assert 0 < int(os.environ["GOMP_SPINCOUNT"]) <= 3000  # with 10,000 a step takes twice as long on contested cores
