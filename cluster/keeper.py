"""The keeper of a job: submits it again when its process dies.

Ray Train replaces training workers, and Ray runs lost tasks again, but nobody restarts the process that started them,
or Ray's own actor that watches over that process. A keeper is a small detached actor beside them. It lives as long as
the job, and comes back by itself when it is killed. A job that ended, was stopped, or failed by itself (a recipe with
an error, too many lost workers) stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import Preempted

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

NAMESPACE = "chartlm"
JOB, ATTEMPT = "CHARTLM_JOB", "CHARTLM_ATTEMPT"  # in the environment of a submitted job
LOOKS_EVERY_SECONDS = 2.0
# A job that dies so soon, so many times in a row, dies of itself.
SHORT_LIFE_SECONDS, SHORT_LIVES = 60.0, 3


def name_of(job: str, attempt: int) -> str:
    """Ray's name of an attempt: that of the job for the first, then `job.2`, `job.3` …"""
    return job if attempt == 1 else f"{job}.{attempt}"


def died(job: JobDetails) -> bool:
    """Whether a failed job was killed or told to stop, rather than ended by an error of its own."""
    code = job.driver_exit_code
    return code is None or code < 0 or code == Preempted.exit_code or (code >= 128 and code != 130)


class _Keeper:
    def __init__(self, address: str, job: str, attempt: int):
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets the variable win over the argument
        self._job, self._attempt = job, attempt
        self._client: JobSubmissionClient | None = None
        threading.Thread(target=self._watch, args=(address,), daemon=True).start()

    def _watch(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient  # slow to import, and not needed by the job itself

        short_lives = 0
        while short_lives < SHORT_LIVES:
            time.sleep(LOOKS_EVERY_SECONDS)
            with contextlib.suppress(ConnectionError, RuntimeError):  # the head is busy; ask again
                self._client = self._client or JobSubmissionClient(address)
                known = {job.submission_id: job for job in self._client.list_jobs()}
                while name_of(self._job, self._attempt + 1) in known:
                    self._attempt += 1  # this actor was restarted itself
                current = known[name_of(self._job, self._attempt)]
                if not current.status.is_terminal():
                    continue
                if current.status.value != "FAILED" or not died(current):
                    break
                life = ((current.end_time or 0) - (current.start_time or 0)) / 1000
                short_lives = short_lives + 1 if life < SHORT_LIFE_SECONDS else 0
                self._again(current)
        ray.kill(ray.get_actor(_name(self._job), NAMESPACE))

    def _again(self, job: JobDetails) -> None:
        assert self._client is not None
        attempt = self._attempt + 1
        environment: dict[str, Any] = dict(job.runtime_env or {})
        environment["env_vars"] = environment.get("env_vars", {}) | {ATTEMPT: str(attempt)}
        self._client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=name_of(self._job, attempt),
            runtime_env=environment,
            metadata=(job.metadata or {}) | {"attempt": str(attempt)},
        )
        self._attempt = attempt


def _name(job: str) -> str:
    return f"keeper-{job}"


def keep(address: str) -> None:
    """Has the job that this process runs kept, where it is a submitted one: it calls this when it has joined its
    cluster, whose dashboard is at `address`.
    """
    job = os.environ.get(JOB)
    if not job:
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    ray.remote(_Keeper).options(
        name=_name(job),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        scheduling_strategy=here,
    ).remote(address, job, int(os.environ.get(ATTEMPT, "1")))
