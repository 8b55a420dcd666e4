"""Jobs on a Ray cluster: submit a verb, look at it, stop it. Goes through the Ray Jobs API.

The tree that is shipped is the tree that runs: code and recipes, without data, runs or .git. The machines of the
cluster must have the packages of pyproject.toml. Secrets pass from this environment to the job's, never on the
command line.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient

from cluster import logs as terminal
from cluster.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
EXCLUDED = [".git", ".venv", "runs", "wandb", "**/__pycache__", "**/.*_cache", ".hypothesis"]
PASSED_ON = ("WANDB_API_KEY", "WANDB_BASE_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
# A cluster that has just started answers before its nodes can take a job.
AGENT_SECONDS = 60
SUBMITTED = ("hospital", "shard", "pretrain", "evaluate", "generate", "finetune")


def _client(args: list[str]) -> tuple[JobSubmissionClient, list[str]]:
    """A client of the cluster that `cluster=URL` or RAY_API_SERVER_ADDRESS names, and the other words."""
    rest = [word for word in args if not word.startswith("cluster=")]
    given = [word.partition("=")[2] for word in args if word.startswith("cluster=")]
    address = given[-1] if given else os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets the variable win over the argument
    try:
        client = JobSubmissionClient(address)
        logging.getLogger("ray").setLevel(logging.ERROR)  # it lists every file that it does not ship
        return client, rest
    except (ConnectionError, RuntimeError) as exc:
        raise ConfigError(f"{address}: no Ray cluster answers there; start one or give cluster=URL ({exc})") from exc


def submit(args: list[str]) -> None:
    """Verb `submit`: runs another verb as a job and returns at once with its name."""
    client, words = _client(args)
    if not words or words[0] not in SUBMITTED:
        raise ConfigError(f"submit what? one of {', '.join(SUBMITTED)}, then its recipe and settings")
    recipe = next((word for word in words[1:] if "=" not in word), "")
    subject = re.sub(r"[^a-zA-Z0-9]+", "-", recipe.removesuffix(".toml").removeprefix("recipes/")).strip("-")
    job = f"{words[0]}-{subject + '-' if subject else ''}{time.strftime('%m%d-%H%M%S')}"
    environment = {
        "working_dir": str(ROOT),
        "excludes": EXCLUDED,
        "env_vars": {name: os.environ[name] for name in PASSED_ON if name in os.environ},
    }
    entrypoint = shlex.join(["python", "-m", "cluster.cli", *words])
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=environment)
            break
        except RuntimeError as exc:
            if "No available agent" not in str(exc):
                raise ConfigError(f"{client.get_address()}: the cluster refused the job: {exc}") from exc
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{client.get_address()}: no node of the cluster takes jobs, {AGENT_SECONDS} s long; where several "
                    "Ray clusters share a machine, start each with --dashboard-agent-listen-port=0"
                ) from exc
            time.sleep(1)
    terminal.say(f"submitted {job}; follow it with ./launch.sh logs {job}")


def status(args: list[str]) -> None:
    """Verb `status`: the jobs of the cluster, or one of them."""
    client, words = _client(args)
    found = [job for job in client.list_jobs() if job.submission_id and (not words or job.submission_id in words)]
    if words and not found:
        raise ConfigError(f"{words[0]}: the cluster knows no such job; ./launch.sh status lists them")
    rows = [(job.submission_id, str(job.status.value), _minutes(job)) for job in sorted(found, key=_started)]
    terminal.table("jobs", ("job", "state", "minutes"), rows)


def _started(job: Any) -> int:
    return int(job.start_time or 0)


def _minutes(job: Any) -> str:
    end = job.end_time or time.time() * 1000
    return f"{(end - job.start_time) / 60_000:.1f}" if job.start_time else ""


def _one(args: list[str]) -> tuple[JobSubmissionClient, str]:
    client, words = _client(args)
    known = [job.submission_id for job in client.list_jobs()]
    if len(words) != 1 or words[0] not in known:
        raise ConfigError(f"{' '.join(words) or 'no job'}: give the name of one job; ./launch.sh status lists them")
    return client, words[0]


def logs(args: list[str]) -> None:
    """Verb `logs`: what a job has printed so far."""
    client, job = _one(args)
    terminal.say(client.get_job_logs(job).rstrip())


def stop(args: list[str]) -> None:
    """Verb `stop`: ends a job. What it had finished stays; submitting it again goes on from there."""
    client, job = _one(args)
    client.stop_job(job)
    terminal.say(f"{job}: stopping; submit it again to go on")
