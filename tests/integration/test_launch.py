"""launch.sh on its own: what it makes, when it makes it again, and what it says where something is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "tiny"
version = "0.1"
[project.optional-dependencies]
dev = []
[tool.setuptools]
packages = ["cluster", "sharding"]
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with the real launch.sh and verbs, but nothing to install, so that set-up takes seconds."""
    tree = tmp_path / "a folder"  # with a blank
    (tree / "cluster").mkdir(parents=True)
    (tree / "sharding").mkdir()
    for name in (
        "launch.sh",
        "cluster/__init__.py",
        "cluster/cli.py",
        "cluster/errors.py",
        "cluster/token.py",
        "sharding/__init__.py",
    ):
        shutil.copy(ROOT / name, tree / name)
    (tree / "sharding/synthetic.py").write_text("def main(args):\n    print('ran', *args)\n")
    (tree / "pyproject.toml").write_text(PROJECT)
    return tree


def launch(tree: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tree / "launch.sh", *words], capture_output=True, text=True, env=os.environ | env, cwd="/")


def assert_ran(done: subprocess.CompletedProcess[str], sets_up: bool) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran out=x\n"
    assert ("setting up" in done.stderr) == sets_up


def test_sets_up_once_and_again_when_it_must(tree: Path) -> None:
    # fails: says why, and is tried again
    (tree / "pyproject.toml").write_text(PROJECT.replace("dev = []", 'dev = ["no-such-package-of-chartlm==1"]'))
    done = launch(tree, "hospital", "out=x")
    assert done.returncode == 2
    assert "no-such-package-of-chartlm" in done.stderr
    assert "setting up failed" in done.stderr.splitlines()[-1]
    (tree / "pyproject.toml").write_text(PROJECT)
    assert_ran(launch(tree, "hospital", "out=x"), sets_up=True)
    assert_ran(launch(tree, "hospital", "out=x"), sets_up=False)
    # half made: killed before the stamp was written
    (tree / ".venv/chartlm.stamp").unlink()
    shutil.rmtree(next((tree / ".venv/lib").glob("python*/site-packages")))
    assert_ran(launch(tree, "hospital", "out=x"), sets_up=True)
    # pyproject.toml changes
    (tree / "pyproject.toml").write_text(PROJECT.replace("0.1", "0.2"))
    assert_ran(launch(tree, "hospital", "out=x"), sets_up=True)
    assert_ran(launch(tree, "hospital", "out=x"), sets_up=False)


def path_with(folder: Path, *tools: str) -> str:
    folder.mkdir()
    for tool in tools:
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    return str(folder)


BASICS = ("bash", "env", "dirname", "readlink", "sha256sum")


def test_says_what_to_install(tree: Path, tmp_path: Path) -> None:
    bare = path_with(tmp_path / "bare", *BASICS)
    for words in (["hospital", "out=x"], []):
        done = launch(tree, *words, PATH=bare)
        assert done.returncode == 2
        assert done.stderr.strip() == (
            "chartlm: needs Python 3.11 or newer; on Debian or Ubuntu: sudo apt-get install python3 python3-venv"
        )
    old = tmp_path / "bare/python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # an older Python fails the version check
    old.chmod(0o755)
    assert "needs Python 3.11 or newer" in launch(tree, "hospital", PATH=bare).stderr
    old.write_text(f'#!/bin/sh\nexec {Path(sys.base_prefix) / "bin/python3"} "$@"\n')
    done = launch(tree, "hospital", "out=x", PATH=bare)
    assert done.returncode == 2
    assert done.stderr.strip() == "chartlm: needs a C++ compiler; on Debian or Ubuntu: sudo apt-get install g++"
    assert not (tree / ".venv").exists()
