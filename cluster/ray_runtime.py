"""Ray: tasks, training workers and jobs. The only file that imports ray.

`map_tasks` is for sharding (many small pure tasks, bounded in flight, retried when a worker dies). `train_workers`
is for pretraining (a fixed group under Ray Train, restarted as a whole when one of them dies). Jobs are submitted
through the Ray Jobs API. Facts about Ray 2.60 that shaped this file stand at the lines they concern.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray prints a paragraph for every worker that dies; whoever runs tasks here says it in a line.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
# The first error of a batch of tasks is raised; those of its neighbours, cancelled with it, are nobody's to fetch.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
# A controller that polls every 2 s (the default) notices a dead worker late.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import arrow, keeper, logs, memory, package
from cluster.errors import ChartlmError, ClusterError, ConfigError, StorageError, TrainingError
from cluster.placement import ClusterConfig
from cluster.token import unseal

ResultT = TypeVar("ResultT")
# What Ray says when its own processes took longer than 30 s.
TOO_SLOW = "timed out during startup"


def start(workers: int = 0) -> None:
    """Joins the cluster that RAY_ADDRESS names, else starts one on this machine with room for `workers`."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        joined = ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        if keeper.JOB in os.environ:
            keeper.keep(f"http://{joined.dashboard_url}")
            _check_nodes()
    else:
        # At its end Ray Train asks a dashboard whether the run still lives, and without one waits 10 s for it: this
        # address refuses at once.
        os.environ.setdefault("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
        cpus = max(os.cpu_count() or 1, workers)
        try:
            ray.init(
                address="local", num_cpus=cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False
            )
        except Exception as exc:  # Ray has no other name for it
            if TOO_SLOW not in str(exc):
                raise
            raise ClusterError(
                "Ray did not start within the 30 s it gives itself: this machine is busy; the same command goes on"
            ) from None


def _check_nodes() -> None:
    """Raises ConfigError where a machine of the cluster has not the packages of pyproject.toml."""
    here = ray.remote(num_cpus=0, max_retries=0)(package.mismatches)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = [_on(here, node["NodeID"]).remote() for node in nodes]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=60)
    for node, answer in zip(nodes, asked, strict=True):
        with contextlib.suppress(ray.exceptions.RayError):  # a node that dies now is noticed by those who need it
            if answer in ready and (found := ray.get(answer)):
                raise ConfigError(
                    f"node {node['NodeManagerAddress']}: {'; '.join(found[:3])}; install what pyproject.toml asks for "
                    "there, or submit with packages=install"
                )


def _on(remote: Any, node: str) -> Any:
    return remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def stop() -> None:
    """Leaves the cluster; a local one ends with it."""
    ray.shutdown()


def cpus() -> int:
    """Number of CPUs of the cluster that was joined; 1 without one."""
    return int(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else 1


def map_tasks(
    task: Callable[..., ResultT], items: Iterable[tuple[Any, ...]], *, in_flight: int, retries: int = 3, gpus: float = 0
) -> Iterator[tuple[int, ResultT]]:
    """Runs `task(*item)` for every item as Ray tasks of one CPU (and `gpus`); yields (index, result) as they end.

    Items are taken lazily, at most `in_flight` at a time, so a stream larger than memory may be given; where that is
    every CPU, an eighth more, two at least, wait for the one that is free next (up to 7 ms a task, measured). A task
    whose worker process dies is run again up to `retries` times: tasks must be pure or write atomically. Where tasks
    fail, the error of the first item that fails is raised, whichever failed sooner: an error of the user's making
    (ChartlmError) comes out as itself; what still runs is cancelled. Without `start` the tasks run in this process.
    """
    if not ray.is_initialized():
        for index, item in enumerate(items):
            yield index, task(*item)
        return

    @functools.wraps(task)
    def in_job(*item: Any) -> ResultT:
        unseal()
        memory.keep_freed()
        arrow.settle()
        return task(*item)

    if in_flight >= cpus():
        in_flight += max(in_flight // 8, 2)
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=retries)(in_job)
    running: dict[Any, int] = {}
    try:
        for index, item in enumerate(items):
            if len(running) >= in_flight:
                yield from _finished(running)
            running[remote.remote(*item)] = index
        while running:
            yield from _finished(running)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def results(task: Callable[..., ResultT], items: Iterable[tuple[Any, ...]], *, in_flight: int) -> list[ResultT]:
    """What `map_tasks` yields, all of it, in the order of the items."""
    return [result for _, result in sorted(map_tasks(task, items, in_flight=in_flight), key=lambda pair: pair[0])]


def _finished(running: dict[Any, int]) -> Iterator[tuple[int, Any]]:
    done, _ = ray.wait(list(running), num_returns=1)
    for reference in done:
        index = running.pop(reference)
        try:
            yield index, ray.get(reference)
        except ray.exceptions.RayTaskError as exc:
            raise _first_error(running, index, exc) from exc
        except ray.exceptions.RayError as exc:
            lost = f"{type(exc).__name__}: {_first_line(exc)}"
            raise ClusterError(f"Ray lost a task for good ({lost}); the same command goes on from here") from exc


def _first_error(running: dict[Any, int], index: int, error: ray.exceptions.RayTaskError) -> BaseException:
    """The error of the lowest item among a failed one and those before it that still run."""
    for reference in sorted((ref for ref, earlier in running.items() if earlier < index), key=running.__getitem__):
        try:
            ray.get(reference)
        except ray.exceptions.RayTaskError as exc:
            error = exc
            break
    return _own_error(error.cause, error)


def _own_error(cause: BaseException | None, otherwise: BaseException) -> BaseException:
    """The one-line error hidden in Ray's wrapping, else the wrapping itself with its traceback."""
    if isinstance(cause, ChartlmError):
        # A fresh object of the same class: Ray's copy carries the remote traceback in its text.
        return type(cause)(*cause.args)
    if isinstance(cause, OSError):
        return StorageError(f"{cause.filename or 'storage'}: {cause.strerror or cause}")
    return otherwise


class _Board:
    """Lines from workers or tasks to their driver: an actor beside the driver, so a machine that dies takes none."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def tell(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


def _board() -> Any:
    return _on(ray.remote(num_cpus=0)(_Board), ray.get_runtime_context().get_node_id()).remote()


def _tell(board: Any, line: str) -> None:
    board.tell.remote(line)


@contextlib.contextmanager
def told() -> Iterator[Callable[[str], None]]:
    """What a task may take along to say lines here, while the context lasts."""
    board = _board()
    with _read_out(board):
        yield functools.partial(_tell, board)


def train_workers(
    entry: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    cluster: ClusterConfig,
    name: str,
    timeout_seconds: int,
) -> None:
    """Runs `entry(config)` on the workers of `cluster` under Ray Train until all return.

    Ray sets RANK, WORLD_SIZE, MASTER_ADDR and the process group. When a process dies the whole group is started
    again, `max_failures` times at most; where the number of workers is a range, with those that have a place.
    Nothing is reported to Ray: a restarted worker finds its place in the run directory (and each report() would cost
    up to 2 s). What workers `say`, and which of them are lost, is said here with their rank. Raises TrainingError when
    the failures are used up.
    """
    hang = cluster.hang_seconds or timeout_seconds // 2
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(hang)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_seconds)
    # Ray prints its own story of every restart, tracebacks included.
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
    import ray.train.torch  # takes torch along, which nobody else here needs

    board = _board()

    class Losses(ray.train.UserCallback):  # type: ignore[misc]
        """Says which workers were lost, from Ray's controller."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for rank, error in sorted(worker_exceptions.items()):
                board.tell.remote(f"rank {rank}: {_loss(error, hang)}")

    fewest, most = cluster.fewest, cluster.most
    scaling = ray.train.ScalingConfig(
        num_workers=most if fewest == most else (fewest, most),
        use_gpu=cluster.gpus_per_worker > 0,
        resources_per_worker={"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {"CPU": 1},
        elastic_resize_monitor_interval_s=cluster.resize_seconds,
    )
    backend = "nccl" if cluster.gpus_per_worker else "gloo"
    try:
        # Ray keeps notes of its own per run and name, and would write them into the home directory.
        with tempfile.TemporaryDirectory(prefix="chartlm-ray-") as scratch, _read_out(board):
            ray.train.torch.TorchTrainer(
                functools.partial(_work, entry, board),
                train_loop_config=config,
                scaling_config=scaling,
                torch_config=ray.train.torch.TorchConfig(backend=backend, timeout_s=timeout_seconds),
                run_config=ray.train.RunConfig(
                    name=name,
                    storage_path=scratch,
                    failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
                    callbacks=[Losses()],
                ),
            ).fit()
    except ray.train.WorkerGroupError as exc:
        causes = [getattr(failure, "cause", failure) for failure in exc.worker_failures.values()]
        own = next((cause for cause in causes if isinstance(cause, ChartlmError)), None)
        if own is not None:
            raise type(own)(*own.args) from exc
        raise TrainingError(
            f"{name}: {len(causes)} training workers died and max_failures={cluster.max_failures} restarts are used "
            f"up; the same command goes on from the last checkpoint. First cause: {_first_line(causes[0])}"
        ) from exc


def _work(entry: Callable[[dict[str, Any]], None], board: Any, config: dict[str, Any]) -> None:
    """What a training worker runs."""
    unseal()
    context = ray.train.get_context()
    rank = context.get_world_rank()

    def tell(line: str) -> None:
        board.tell.remote(f"rank {rank}: {line}")

    logs.forward(tell)
    node = ray.get_runtime_context().get_node_id()[:6]
    os.environ["CHARTLM_NODE"] = node
    tell(f"of {context.get_world_size()}, on {ray.util.get_node_ip_address()} (node {node}), process {os.getpid()}")
    entry(config)


def _loss(error: BaseException, hang_seconds: int) -> str:
    """Why a worker was lost, in a line. Text of foreign errors could be text of a note: only their kind is told."""
    cause = getattr(error, "health_check_failure", None) or error
    if "Timeout" in type(cause).__name__:
        return f"lost: it was silent for {hang_seconds} s and is replaced"
    if isinstance(cause, ray.exceptions.RayActorError):
        return "lost: its process or machine died"
    own = getattr(cause, "cause", cause)
    if isinstance(own, ChartlmError):
        return f"lost: {own}"
    last = traceback.extract_tb(own.__traceback__)[-1:]
    return f"lost: {type(own).__name__}" + "".join(f" in {os.path.basename(at.filename)}:{at.lineno}" for at in last)


@contextlib.contextmanager
def _read_out(board: Any) -> Iterator[None]:
    """Says what stands on the board, while workers train."""
    over = threading.Event()

    def read() -> None:
        last = False
        while not last:
            last = over.wait(0.5)
            with contextlib.suppress(ray.exceptions.RayError):
                for line in ray.get(board.take.remote(), timeout=10):
                    logs.say(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join()


def machine_goes() -> bool:
    """Whether the cluster has announced that it takes away a machine of this run. Every training worker must ask as
    often as the others: Ray makes it a barrier.
    """
    import ray.train

    return ray.train.get_preemption_info() is not None


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
