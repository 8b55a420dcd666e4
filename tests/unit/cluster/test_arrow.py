"""What pyarrow does without in a process of chartlm, in a process of its own: it holds for a whole process."""

from __future__ import annotations

import subprocess
import sys

import pytest

SAYS = """
import sys
import pyarrow as pa
{settle}
pa.array(["a"])
print("pandas" in sys.modules, pa.default_memory_pool().backend_name)
table = pa.table({{"a": [1, 2]}})
print(table.to_pandas()["a"].sum())
"""


def test_arrays_are_made_without_pandas_and_tables_still_become_its_frames() -> None:
    pytest.importorskip("pandas")

    def said(settle: str) -> list[str]:
        done = subprocess.run([sys.executable, "-c", SAYS.format(settle=settle)], capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return done.stdout.split("\n")

    assert said("from cluster import arrow; arrow.settle()")[:2] == ["False system", "3"]
    assert said("")[0].startswith("True")  # else there is nothing to spare
