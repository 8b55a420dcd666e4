"""What a job takes along: the tree as one zip, and the packages it needs.

The same tree gives the same bytes, so a cluster that has it already is not sent it again.
"""

from __future__ import annotations

import importlib.metadata
import os
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from cluster.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
# Names that never travel: what git, Python and runs leave, and notes.
LEFT_BEHIND = {".git", ".venv", "runs", "wandb", "data", "node_modules", "__pycache__"}
LEFT_BEHIND_ENDINGS = (".egg-info", "_cache", ".pyc", ".log", ".lock", ".tmp")
LIMIT_BYTES = 100_000_000
RECIPE = "job.toml"  # the resolved recipe, in the root of what is shipped


def tree(root: Path = ROOT) -> Iterator[tuple[Path, int]]:
    """(path below `root`, bytes) of every file that a job takes along, sorted."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not _stays(name))
        for name in sorted(names):
            path = Path(folder) / name
            if not _stays(name) and path.is_file() and not path.is_symlink():
                yield path.relative_to(root), path.stat().st_size


def _stays(name: str) -> bool:
    return name in LEFT_BEHIND or name.endswith(LEFT_BEHIND_ENDINGS) or name == ".hypothesis"


def pack(target: Path, recipe: bytes | None, root: Path = ROOT) -> tuple[int, int]:
    """Writes the zip; returns (files, bytes before packing). Raises ConfigError where that is more than 100 MB."""
    found = list(tree(root))
    total = sum(size for _, size in found)
    if total > LIMIT_BYTES:
        largest = sorted(found, key=lambda entry: -entry[1])[:3]
        named = ", ".join(f"{path} ({size / 1e6:,.0f} MB)" for path, size in largest)
        raise ConfigError(
            f"{root}: {total / 1e6:,.0f} MB would be shipped, {LIMIT_BYTES / 1e6:.0f} MB is the limit; the largest are "
            f"{named}: move data out of the tree, or into data/ or runs/, which stay behind"
        )
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for path, _ in found:
            packed.writestr(zipfile.ZipInfo(str(path)), (root / path).read_bytes(), zipfile.ZIP_DEFLATED)
        if recipe is not None:
            packed.writestr(zipfile.ZipInfo(RECIPE), recipe)
    return len(found), total


def requirements() -> list[str]:
    """What pyproject.toml asks for, without Ray: a job runs on the cluster's own."""
    asked: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [line for line in asked if Requirement(line).name != "ray"]


def mismatches() -> list[str]:
    """Packages of this machine that are not those of pyproject.toml, one text each; empty where all is well."""
    found = []
    for line in requirements():
        wanted = Requirement(line)
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{wanted.name}{wanted.specifier} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            found.append(f"{wanted.name} is {version}, {wanted.specifier} is wanted")
    return found
