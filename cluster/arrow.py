"""pyarrow in the processes of chartlm: one store of memory with numpy, and no pandas."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pyarrow as pa


@functools.lru_cache(maxsize=1)
def settle() -> None:
    """Has pyarrow take memory from the C library, where numpy takes it: what one has freed serves the other, and
    no page is cleared twice (with `memory.keep_freed`).

    And has it make arrays without pandas. With the first array it imports pandas where that is installed, to know its
    columns when it sees one: 0.24 s of every process (measured), and no process of chartlm has such a column. It is
    told once that there is none; `to_pandas()` imports it all the same. For processes of chartlm, not for a caller's.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, _NoPandas)
        try:
            pa.array([])
        finally:
            sys.meta_path.remove(_NoPandas)


class _NoPandas:
    """A finder that finds no pandas, and leaves all else to the others."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is spared", name=name)
