"""Jobs on a Ray cluster: submit a verb, look at it, stop it, go on with it. Goes through the Ray Jobs API.

The tree that is shipped is the tree that runs: code and recipes, without data, runs or .git, and the recipe of the job,
resolved and checked here, its places absolute. Secrets pass from this environment to the job's, sealed (token.py),
never on a command line. A job whose process dies is submitted again by its keeper (keeper.py): `job`, `job.2`, … are
one job to the user.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.job_submission import JobDetails, JobSubmissionClient

from cluster import config, keeper, package, storage
from cluster import logs as terminal
from cluster.cli import VERBS
from cluster.errors import ClusterError, ConfigError
from cluster.token import seal, token_file

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PASSED_ON = ("WANDB_", "AWS_", "CHARTLM_CACHE_GB")  # beginnings of names
# A cluster that has just started answers before its nodes can take a job.
AGENT_SECONDS = 60
# A stopped training run saves before it leaves; Ray would kill it after 3 s.
STOP_SECONDS = 600
SUBMITTED = ("hospital", "shard", "pretrain", "evaluate", "generate", "finetune")
LOOKED_INTO = 20  # of how many newest jobs `status` reads the log


def answers(address: str) -> bool:
    """Whether a Ray cluster that takes our token answers at an address."""
    try:
        _connect(address).list_jobs()
    except (ClusterError, ConfigError, RuntimeError):
        return False
    return True


def _connect(address: str) -> JobSubmissionClient:
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets the variable win over the argument
    try:
        client = JobSubmissionClient(address)
    except ConnectionError as exc:
        raise ClusterError(
            f"{address}: no Ray cluster answers there; ./launch.sh up starts one, cluster=URL names another"
        ) from exc
    except (RuntimeError, ray.exceptions.AuthenticationError) as exc:
        raise _refused(address, exc) from exc
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # they tell of every package that is sent
        logging.getLogger(name).setLevel(logging.ERROR)
    return client


def _refused(address: str, exc: BaseException) -> ClusterError:
    text = " ".join(str(exc).split())
    if re.search(r"uthenticat|Unauthorized|Forbidden|\b40[13]\b", text):
        return ClusterError(
            f"{address}: the cluster does not take this token; {token_file()} must be a copy of its head's "
            "(or RAY_AUTH_TOKEN_PATH name one)"
        )
    return ClusterError(f"{address}: the cluster refused: {text[:300]}")


def _options(args: list[str], **defaults: str) -> tuple[dict[str, str], list[str]]:
    """The words `key=value` of some keys, and the others."""
    found, rest = dict(defaults), []
    for word in args:
        key, separator, value = word.partition("=")
        if separator and key in found:
            found[key] = value
        else:
            rest.append(word)
    return found, rest


def _client(args: list[str], **defaults: str) -> tuple[JobSubmissionClient, dict[str, str], list[str]]:
    address = os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)
    options, rest = _options(args, cluster=address, **defaults)
    return _connect(options["cluster"]), options, rest


def submit(args: list[str]) -> None:
    """Verb `submit`: runs another verb as a job and returns at once with its name. DRY_RUN=1 only shows it."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)
    options, words = _options(args, cluster=address, packages="present")
    if not words or words[0] not in SUBMITTED:
        raise ConfigError(f"submit what? one of {', '.join(SUBMITTED)}, then its recipe and settings")
    if options["packages"] not in ("present", "install"):
        raise ConfigError(f"packages={options['packages']}: give present (nodes have them) or install (Ray does it)")
    command, recipe = _resolved(words)
    job = f"{words[0]}-{_subject(words[1:])}{time.strftime('%m%d-%H%M%S')}"
    passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    environment: dict[str, Any] = {
        "env_vars": {keeper.JOB: job, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
    }
    if options["packages"] == "install":
        environment["pip"] = package.requirements()
    entrypoint = shlex.join(["python", "-m", "cluster.cli", *command])
    with tempfile.TemporaryDirectory(prefix="chartlm-") as folder:
        zipped = Path(folder) / "tree.zip"
        files, size = package.pack(zipped, recipe)
        shipped = f"{files} files, {size / 1e6:.1f} MB ({zipped.stat().st_size / 1e6:.1f} MB packed)"
        if os.environ.get("DRY_RUN", "0") not in ("", "0"):
            terminal.say(f"would submit {job} to {options['cluster']}: {entrypoint}")
            terminal.say(f"would ship {shipped}; packages: {options['packages']}")
            terminal.say(f"would pass on, by name: {', '.join(sorted(passed)) or 'nothing'}")
            if recipe is not None:
                terminal.say(f"{package.RECIPE}:\n{recipe.decode().rstrip()}")
            return
        client = _connect(options["cluster"])
        theirs = client._do_request("GET", "/api/version").json()["ray_version"]  # get_version() tells the API's
        if theirs != ray.__version__:
            raise ClusterError(f"{options['cluster']}: runs Ray {theirs}, this tree is made for {ray.__version__}")
        terminal.say(f"ships {shipped}")
        environment["working_dir"] = str(zipped)
        environment["env_vars"] |= seal(passed)
        _send(client, options["cluster"], entrypoint, job, environment)
    terminal.say(f"submitted {job}; follow it with ./launch.sh logs {job} -f, or ./launch.sh status {job}")


def _send(client: Any, address: str, entrypoint: str, job: str, environment: dict[str, Any]) -> None:
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=job,
                runtime_env=environment,
                metadata={"job": job, "attempt": "1", "verb": job.partition("-")[0]},
            )
            return
        except (RuntimeError, ray.exceptions.AuthenticationError) as exc:
            if "No available agent" not in str(exc):
                raise _refused(address, exc) from exc
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{address}: no node of the cluster takes jobs, {AGENT_SECONDS} s long; where several Ray clusters "
                    "share a machine, start each with --dashboard-agent-listen-port=0"
                ) from exc
            time.sleep(1)


def _resolved(words: list[str]) -> tuple[list[str], bytes | None]:
    """The words that the job runs, and its recipe. Raises ConfigError as the verb itself would."""
    verb = VERBS[words[0]]
    if not verb.recipe:
        return [words[0], *(storage.absolute(w) if "=" not in w and storage.exists(w) else w for w in words[1:])], None
    assert verb.module is not None
    model = getattr(importlib.import_module(verb.module), verb.recipe)
    if not isinstance(model, type):
        model = model(words[1:])
    recipe = config.absolute(config.load(model, words[1:]))
    return [words[0], package.RECIPE], config.to_toml(recipe)


def _subject(words: list[str]) -> str:
    """What a job is about, for its name: `recipes/mimic3/awd_lstm.toml` → `mimic3-awd-lstm-`."""
    place = next((word for word in words if "=" not in word), "").rstrip("/").removesuffix("/recipe.toml")
    parts = place.removesuffix(".toml").split("/")[-2 if place.endswith(".toml") else -1 :]
    subject = re.sub(r"[^a-zA-Z0-9]+", "-", "-".join(parts)).strip("-")
    return f"{subject}-" if subject else ""


def resume(args: list[str]) -> None:
    """Verb `resume`: submits the pretraining of a run directory again, by the recipe that lies in it."""
    places = [word for word in args if "=" not in word]
    if len(places) != 1:
        raise ConfigError("resume what? give one run directory; settings are written key=value")
    recipe = storage.join(places[0], "recipe.toml")
    if not storage.exists(recipe):
        raise ConfigError(f"{places[0]}: is not a run directory (it has no recipe.toml); check the path")
    submit(["pretrain", recipe, *(word for word in args if "=" in word)])


@dataclass(frozen=True)
class Job:
    """A job as the user knows it: all its attempts, oldest first."""

    name: str
    attempts: list[JobDetails]

    @property
    def last(self) -> JobDetails:
        """The attempt that runs, or was the last to."""
        return self.attempts[-1]

    @property
    def state(self) -> str:
        """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
        return str(self.last.status.value)

    @property
    def verb(self) -> str:
        """What it runs."""
        return str((self.last.metadata or {}).get("verb", ""))

    def log(self, client: JobSubmissionClient) -> str:
        """What it has printed, over all attempts."""
        return "".join(str(client.get_job_logs(attempt.submission_id)) for attempt in self.attempts)


def _jobs(client: JobSubmissionClient) -> list[Job]:
    """The jobs of the cluster, oldest first."""
    found: dict[str, list[JobDetails]] = {}
    for details in sorted(client.list_jobs(), key=lambda job: int(job.start_time or 0)):
        if details.submission_id:
            found.setdefault((details.metadata or {}).get("job", details.submission_id), []).append(details)
    return [Job(name, attempts) for name, attempts in found.items()]


def _one(args: list[str], **defaults: str) -> tuple[JobSubmissionClient, Job, dict[str, str]]:
    client, options, words = _client(args, **defaults)
    known = {job.name: job for job in _jobs(client)}
    if len(words) != 1 or words[0] not in known:
        raise ConfigError(f"{' '.join(words) or 'no job'}: give the name of one job; ./launch.sh status lists them")
    return client, known[words[0]], options


def status(args: list[str]) -> None:
    """Verb `status`: the jobs of the cluster, or one of them, and where each stands."""
    client, _, words = _client(args)
    found = [job for job in _jobs(client) if not words or job.name in words]
    if words and not found:
        raise ConfigError(f"{words[0]}: the cluster knows no such job; ./launch.sh status lists them")
    if not found:
        terminal.say(f"{client.get_address()}: no jobs yet; ./launch.sh submit runs one")
        return
    headings = ("job", "verb", "state", "at", "step", "tokens/s", "loss", "checkpoint", "restarts", "nodes")
    rows = [
        (job.name, job.verb, job.state, *standing(job.log(client), len(job.attempts) - 1))
        for job in found[-LOOKED_INTO:]
    ]
    terminal.table(f"jobs of {client.get_address()}", headings, rows)
    if len(found) > LOOKED_INTO:
        terminal.say(f"{len(found) - LOOKED_INTO} older jobs are not shown")
    if words and found[-1].state == "FAILED":
        lines = [line for line in found[-1].log(client).splitlines() if line.strip()]
        terminal.say(lines[-1] if lines else " ".join((found[-1].last.message or "").split())[:300])


def standing(log: str, restarts: int) -> tuple[str, str, str, str, str, str, str]:
    """(how far, step, tokens/s, loss, checkpoint, restarts, nodes) by the last words of progress in a job's log;
    empty where it has none.
    """
    how_far = words = ""
    for line in log.splitlines():
        if found := re.match(r"([a-z][\w -]*): (\d+%|done|stopped) (.*)", line):
            name, far, words = found.groups()
            how_far = f"{name} {far}"
        restarts += "interrupted at step" in line
    numbers = []
    for pattern in (r"step ([\d,]+)", r"([\d,]+) tokens/s", r"loss ([\d.]+)", r"checkpoint ([\d,]+)", r"nodes (\d+)"):
        number = re.search(pattern, words)
        numbers.append(number[1] if number else "")
    step, rate, loss, saved, nodes = numbers
    return how_far, step, rate, loss, saved, str(restarts), nodes


def logs(args: list[str]) -> None:
    """Verb `logs`: what a job has printed, with `-f` also what it will; `rank=N` only what worker N said."""
    client, job, options = _one([word for word in args if word != "-f"], rank="")
    if options["rank"] and not options["rank"].isdigit():
        raise ConfigError(f"rank={options['rank']}: a worker's number, 0 for the first")
    for line in _lines(client, job, "-f" in args):
        if not options["rank"] or line.startswith(f"rank {options['rank']}: "):
            terminal.say(line)


def _lines(client: JobSubmissionClient, job: Job, follow: bool) -> Iterator[str]:
    if not follow or _is_over(job.last):
        yield from job.log(client).splitlines()
        return
    seen: set[str] = set()
    while True:
        for attempt in job.attempts:
            if attempt.submission_id not in seen:
                seen.add(str(attempt.submission_id))
                yield from _followed(client, str(attempt.submission_id))
        job = next(found for found in _jobs(client) if found.name == job.name)
        if job.last.submission_id in seen and not _is_over(job.last):
            time.sleep(2 * keeper.LOOKS_EVERY_SECONDS)  # its keeper submits it again where it died
            job = next(found for found in _jobs(client) if found.name == job.name)
        if job.last.submission_id in seen and job.last.status.is_terminal():
            return


def _is_over(attempt: JobDetails) -> bool:
    """Whether an attempt has ended and its keeper does not submit the job again."""
    return attempt.status.is_terminal() and not (attempt.status.value == "FAILED" and keeper.died(attempt))


def _followed(client: JobSubmissionClient, attempt: str) -> Iterator[str]:
    """The lines of an attempt as they come, to its end."""
    pieces = client.tail_job_logs(attempt)
    rest = ""
    with contextlib.closing(asyncio.new_event_loop()) as loop, contextlib.suppress(StopAsyncIteration):
        while True:
            *whole, rest = (rest + loop.run_until_complete(anext(pieces))).split("\n")
            yield from whole
    if rest:
        yield rest


def stop(args: list[str]) -> None:
    """Verb `stop`: ends a job when it has saved; submitting it again goes on from there."""
    client, job, _ = _one(args)
    if job.last.status.is_terminal():
        raise ConfigError(f"{job.name}: is {job.state} already; nothing to stop")
    client.stop_job(job.last.submission_id)
    deadline = time.monotonic() + STOP_SECONDS
    with terminal.progress(f"stop {job.name}", STOP_SECONDS) as advance:
        while not client.get_job_status(job.last.submission_id).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.5)
            advance(STOP_SECONDS - (deadline - time.monotonic()), "it saves")
    terminal.say(f"{job.name}: {client.get_job_status(job.last.submission_id).value}; submit it again to go on")
