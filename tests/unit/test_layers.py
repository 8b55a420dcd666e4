"""The house's floors and doors: downstream → pretrain → sharding → cluster → libraries; one door per dependency."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ["cluster", "sharding", "pretrain", "downstream"]
DOORS = {
    "ray": ("cluster/",),
    "wandb": ("cluster/tracking.py",),
    "fsspec": ("cluster/storage.py",),
    "deepspeed": ("pretrain/engine.py",),
    "sentencepiece": ("sharding/tokenizer.py",),
    "pyarrow": ("sharding/", "downstream/", "cluster/arrow.py"),
    "torch": ("pretrain/", "downstream/"),
}
SLOW = ["torch._dynamo", "matplotlib", "ray", "deepspeed", "setuptools", "wandb"]
STARTS = f"""
import sys
import downstream.predict, downstream.finetune, downstream.concepts.annotate, pretrain.evaluate, pretrain.generate
print("to read:", *(name for name in {SLOW} if name in sys.modules))
import pretrain.train
print("to train:", *(name for name in {SLOW} if name in sys.modules and name != "deepspeed"))
"""
DRAWERS = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}


def imports() -> Iterator[tuple[str, str]]:
    """(file, imported package) of every import of the source, also those inside functions."""
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{path}: relative import"
                    modules = [node.module or ""]
                else:
                    continue
                for module in modules:
                    yield path.relative_to(ROOT).as_posix(), module.split(".")[0]


def test_imports_never_climb() -> None:
    climbing = [
        f"{file} imports {package}"
        for file, package in imports()
        if package in FLOORS and FLOORS.index(package) > FLOORS.index(file.split("/")[0])
    ]
    assert climbing == []


def test_each_dependency_has_one_door() -> None:
    beside = [
        f"{file} imports {package}"
        for file, package in imports()
        if package in DOORS and not file.startswith(DOORS[package])
    ]
    assert beside == []
    assert {package for _, package in imports()} >= DOORS.keys()  # the test sees what it should see


def test_no_fifth_package_and_no_drawers() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(FLOORS)
    assert [path.name for floor in FLOORS for path in (ROOT / floor).rglob("*.py") if path.name in DRAWERS] == []


def test_a_start_does_not_wait_for_what_it_does_not_use() -> None:
    """Seconds of every command, and of every worker that Ray starts. Who reads a checkpoint needs no DeepSpeed."""
    said = subprocess.run([sys.executable, "-c", STARTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.split("\n")[:2] == ["to read:", "to train:"]
