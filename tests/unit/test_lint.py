import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_lint() -> None:
    """ruff (lint and format), mypy --strict and shellcheck say nothing."""
    done = subprocess.run([ROOT / "launch.sh", "lint"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
