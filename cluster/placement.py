"""Section `cluster` of a training recipe: how many workers, and how long to wait for one that is silent.

None of it changes what is learned. It knows nothing of Ray, so a machine without Ray can read a recipe.
"""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from cluster.config import Section


class ClusterConfig(Section):
    """Where the workers of a training run are, and when one of them is given up."""

    workers: int | str = Field(
        2, description='Ray Train workers; "4..16": as many as there is room for; 0 trains in this process, without Ray'
    )
    gpus_per_worker: int = Field(0, ge=0)
    max_failures: int = Field(
        3, ge=0, description="how often dead workers are replaced; a machine that goes is no failure"
    )
    start_seconds: int = Field(60, ge=5, description="wait so long until all workers have a place, then look again")
    hang_seconds: int | None = Field(
        None, ge=2, description="replace a worker that is silent so long; half of engine.timeout_seconds if not given"
    )
    resize_seconds: int = Field(60, ge=1, description='with "4..16": look so often whether machines came or came back')

    @field_validator("workers")
    @classmethod
    def _workers_are_a_range(cls, workers: int | str) -> int | str:
        fewest, most = _bounds(workers)
        if not 0 <= fewest <= most or (isinstance(workers, str) and not fewest):
            raise ValueError('give a number of workers, or "4..16" for 4 to 16 of them')
        return workers

    @property
    def fewest(self) -> int:
        """With fewer workers the run waits."""
        return _bounds(self.workers)[0]

    @property
    def most(self) -> int:
        """More workers are never taken."""
        return _bounds(self.workers)[1]


def _bounds(workers: int | str) -> tuple[int, int]:
    if isinstance(workers, int):
        return workers, workers
    found = re.fullmatch(r"(\d+)\.\.(\d+)", workers)
    return (int(found[1]), int(found[2])) if found else (-1, -1)
