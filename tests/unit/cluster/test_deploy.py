"""deploy/ as far as it can be tried without a cloud: the schemas of who reads the files, and Slurm's script run."""

import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from clusters import command_line
from corpora import tiny_corpus
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster import config
from cluster.cli import VERBS

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
(RAY,) = re.findall(r"^ray\[.*\]==(.+)$", "\n".join(PROJECT["dependencies"]), re.M)
# s3:// for a job: versions that go together.
S3 = [line for line in PROJECT["optional-dependencies"]["dev"] if line.startswith(("s3fs==", "boto3=="))]
CRD = os.environ.get("CHARTLM_KUBERAY_CRD", "")


def launcher(cloud: str) -> dict[str, Any]:
    """The cluster launcher's file, with Ray's own defaults, as `ray up` prepares it."""
    return prepare_config(yaml.safe_load((DEPLOY / f"{cloud}.yaml").read_text()))


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_accepts_the_clusters(cloud: str) -> None:
    cluster = launcher(cloud)
    validate_config(cluster)
    assert cluster["provider"]["type"] == cloud
    for image in ("head_image", "worker_image"):
        assert cluster["docker"][image].startswith(f"rayproject/ray:{RAY}-py3")
    head = cluster["available_node_types"].pop(cluster["head_node_type"])
    assert head["max_workers"] == 0
    assert "GPU" not in head["resources"]
    for workers in cluster["available_node_types"].values():
        assert 0 <= workers["min_workers"] <= workers["max_workers"] <= cluster["max_workers"]


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_clusters_are_closed(cloud: str) -> None:
    cluster = launcher(cloud)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert not cluster["provider"]["cache_stopped_nodes"]
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        (start,) = (command for command in commands if "ray start" in command)
        assert start.startswith("export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0;")
        assert "0.0.0.0" not in start
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_nodes_get_the_packages_of_the_project(cloud: str, tmp_path: Path) -> None:
    lists, installs = launcher(cloud)["setup_commands"]
    (tmp_path / "chartlm").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "chartlm")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", lists], env={"HOME": str(tmp_path), "PATH": path}, check=True)
    assert (tmp_path / "requirements.txt").read_text().splitlines() == PROJECT["dependencies"]
    assert installs.startswith("pip install -r ~/requirements.txt ")
    if cloud == "aws":
        assert installs.split()[-2:] == S3


def test_ec2_knows_every_key_of_its_machines() -> None:
    session = pytest.importorskip("botocore.session").get_session()
    from botocore.validate import ParamValidator

    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, kind in launcher("aws")["available_node_types"].items():
        report = ParamValidator().validate(kind["node_config"] | {"MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"


@functools.cache
def rayjob() -> dict[str, Any]:
    """deploy/rayjob.yaml."""
    return yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())


def groups() -> tuple[dict[str, Any], dict[str, Any]]:
    """The head and the workers of the RayJob."""
    spec = rayjob()["spec"]["rayClusterSpec"]
    (workers,) = spec["workerGroupSpecs"]
    return spec["headGroupSpec"], workers


def test_rayjob_says_what_we_rely_on() -> None:
    job = rayjob()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    assert spec["rayClusterSpec"]["rayVersion"] == RAY
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "chartlm-token"}
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert "$" not in spec["runtimeEnvYAML"]  # KubeRay hands it to `ray job submit` through a shell
    assert environment["pip"] == [line for line in PROJECT["dependencies"] if not line.startswith("ray[")] + S3
    for group in groups():
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # what KubeRay wants beside its second autoscaler
        (container,) = pod["containers"]
        assert container["image"].startswith(f"rayproject/ray:{RAY}-py3")
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])


def test_rayjob_tells_no_secret() -> None:
    assert "Secret" not in [document["kind"] for document in yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())]
    for group in groups():
        (container,) = group["template"]["spec"]["containers"]
        secret = [entry for entry in container["env"] if re.search("KEY|SECRET|TOKEN|PASSWORD", entry["name"])]
        assert len(secret) == 3
        for entry in secret:
            assert set(entry) == {"name", "valueFrom"}
            assert entry["valueFrom"]["secretKeyRef"]["key"] == entry["name"]


def test_rayjob_runs_a_verb_on_the_gpus_it_asks_for() -> None:
    from pretrain.train import TrainRecipe

    python, module, name, verb, *words = shlex.split(rayjob()["spec"]["entrypoint"])
    assert (python, module, name) == ("python", "-m", "cluster.cli")
    assert VERBS[verb].module == "pretrain.train"
    recipe = config.load(TrainRecipe, [str(ROOT / words[0]), *words[1:]])
    _, workers = groups()
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    machines = int(limits["nvidia.com/gpu"]) // recipe.cluster.gpus_per_worker
    assert recipe.cluster.fewest == workers["minReplicas"] * machines
    assert recipe.cluster.most == workers["maxReplicas"] * machines


@pytest.mark.skipif(not CRD, reason="CHARTLM_KUBERAY_CRD names no ray.io_rayjobs.yaml of KubeRay")
def test_kuberay_accepts_the_rayjob() -> None:
    (version,) = (
        v for v in yaml.load(Path(CRD).read_text(), yaml.CSafeLoader)["spec"]["versions"] if v["name"] == "v1"
    )
    schema = version["schema"]["openAPIV3Schema"]
    _close(schema)
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own; the CRD says no more of it
    errors = [
        f"{list(error.path)}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(rayjob())
    ]
    assert errors == []


def _close(schema: Any) -> None:
    """Makes keys that a schema does not name errors, as `kubectl apply` does."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            schema.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
        for inner in schema.values():
            _close(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _close(inner)


def test_slurm_script_is_sound() -> None:
    script = DEPLOY / "slurm.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    checker = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or pytest.skip("no shellcheck")
    done = subprocess.run([checker, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# Slurm's commands for one node: srun starts the task, scontrol writes down what it was asked.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$(dirname "$0")/scontrol.log"
"""
# Ray without Ray, where only the script is tried: writes down its words, runs what follows `--`.
FAKE_RAY = """#!/usr/bin/env bash
[[ $1 == symmetric-run ]] || exit 0
echo "$@" >"$(dirname "$0")/ray.log"
while [[ $1 != -- ]]; do shift; done
"${@:2}"
"""
FAKE_VERB = """
import os, pathlib, signal, sys, time

assert os.environ["RAY_ADDRESS"].startswith("127.0.0.1:") and os.environ["RAY_AUTH_MODE"] == "token"
token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])
assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64
if sys.argv[1] == "listens":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if sys.argv[1] != "exits":
    pathlib.Path(sys.argv[2]).touch()
    time.sleep(60)
sys.exit(int(sys.argv[2]))
"""


class Slurm:
    """A tree to submit from, and Slurm's commands beside it."""

    def __init__(self, folder: Path, job: int):
        self.tree, self._bin, self._job = folder / "tree", folder / "bin", job
        for made in (self.tree, self._bin):
            made.mkdir()
        (self.tree / "launch.sh").touch()
        self.write(self._bin / "srun", SRUN)
        self.write(self._bin / "scontrol", SCONTROL)

    @staticmethod
    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self, words: list[str], restarts: int = 0, within: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Runs the script as Slurm would on the first node."""
        foreign = ("RAY_", "SLURM_", "PYTHONPATH")  # launch.sh test puts the real tree on the path
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        environment |= {
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(self.tree),
            "SLURM_JOB_ID": str(self._job),
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_CPUS_ON_NODE": "2",
        } | ({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {})
        return subprocess.Popen(
            [*within, "bash", DEPLOY / "slurm.sh", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def requeued(self) -> list[str]:
        """What scontrol was asked."""
        log = self._bin / "scontrol.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    """A tree whose Ray and whose verb are stand-ins."""
    made = Slurm(tmp_path, 40_000_000 + os.getpid())
    made.write(made.tree / ".venv/bin/ray", FAKE_RAY)
    made.write(made.tree / ".venv/bin/python", f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    made.write(made.tree / "cluster/cli.py", FAKE_VERB)
    return made


def _left_nothing(slurm: Slurm) -> bool:
    return list((slurm.tree / "runs").iterdir()) == [] and not list(Path("/tmp").glob(f"chartlm-{slurm._job}-*"))


@pytest.mark.parametrize(("code", "queued"), [(0, False), (2, False), (75, True), (143, False)])
def test_slurm_queues_a_saved_run_again(slurm: Slurm, code: int, queued: bool) -> None:
    job = slurm.start(["exits", str(code)])
    said, _ = job.communicate(timeout=60)
    assert job.returncode == code, said
    assert slurm.requeued() == ([f"requeue {slurm._job}"] if queued else [])
    asked = (slurm.tree / ".venv/bin/ray.log").read_text()
    assert re.match(r"symmetric-run --address 127\.0\.0\.1:2\d{4} --min-nodes 1 --num-cpus 2 --num-gpus 0 -- ", asked)
    assert _left_nothing(slurm)


@pytest.mark.parametrize(("verb", "code"), [("listens", 75), ("is deaf", 143)])
def test_slurm_tells_the_verb_before_the_time_limit(slurm: Slurm, verb: str, code: int, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    job = slurm.start([verb, str(ready)])
    _wait_for(ready.exists, job)
    # When Slurm preempts a job it tells the step too, which must live until the verb has saved.
    for task in [psutil.Process(job.pid), *psutil.Process(job.pid).children()]:
        task.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == code, said
    assert "told to stop; the run saves" in said
    assert slurm.requeued() == [f"requeue {slurm._job}"]
    assert _left_nothing(slurm)


def test_slurm_does_not_go_round_for_ever(slurm: Slurm) -> None:
    job = slurm.start(["exits", "75"], restarts=100)
    said, _ = job.communicate(timeout=60)
    assert (job.returncode, slurm.requeued()) == (2, [])
    assert "queued again 100 times" in said


def test_slurm_takes_a_ray_that_does_not_start_for_a_failure(slurm: Slurm) -> None:
    slurm.write(slurm.tree / ".venv/bin/ray", "#!/bin/sh\nexit 0\n")  # as symmetric-run does when `ray start` fails
    job = slurm.start(["exits", "0"])
    said, _ = job.communicate(timeout=60)
    assert (job.returncode, slurm.requeued()) == (2, [])
    assert "Ray did not start" in said


def _wait_for(there: Any, job: subprocess.Popen[str], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


# `ray stop`, with which symmetric-run ends, ends every Ray process that it can see, and Ray's ports are the machine's:
# the real Ray runs where it sees no processes and no network but its own.
ALONE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net")
INSIDE = ("bash", "-c", 'ip link set lo up && exec "$@"', "inside")


@pytest.fixture
def real(tmp_path: Path) -> Slurm:
    """A tree with this checkout's code and packages."""
    if subprocess.run([*ALONE, *INSIDE, "true"], capture_output=True).returncode:
        pytest.skip("namespaces of processes and network (unshare, ip) are not to be had here")
    made = Slurm(tmp_path, 41_000_000 + os.getpid())
    for name in ("cluster", "sharding", "pretrain", "downstream", "recipes"):
        (made.tree / name).symlink_to(ROOT / name)
    (made.tree / ".venv").symlink_to(sys.prefix)
    return made


def test_slurm_with_ray(real: Slurm, tmp_path: Path) -> None:
    # Ray ends what has this name; of real neighbours some end by themselves.
    shutil.copy(str(shutil.which("sleep")), tmp_path / "raylet")
    with subprocess.Popen([str(tmp_path / "raylet"), "600"]) as neighbour:
        job = real.start(["hospital", f"out={tmp_path / 'hospital'}", "patients=5"], within=(*ALONE, *INSIDE))
        said, _ = job.communicate(timeout=300)
        ended = neighbour.poll()
        neighbour.kill()
    assert job.returncode == 0, said
    assert "Head node started" in said
    assert (tmp_path / "hospital/NOTEEVENTS.csv.gz").exists()
    assert real.requeued() == []
    assert ended is None


@pytest.mark.slow
def test_a_run_in_slurm_saves_is_queued_again_and_ends(real: Slurm, tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path / "shards")
    words = [
        *("pretrain", f"run_dir={tmp_path / 'run'}", f"data.corpus={corpus}", "steps=400", "data.lanes=4"),
        *("data.bptt=16", "model.embedding=12", "model.hidden=16", "model.layers=2", "workers=1", "log_every=5"),
        *("eval_every=1000", "save_every=1000", "engine.timeout_seconds=60"),
    ]
    metrics = tmp_path / "run/metrics.jsonl"
    first = real.start(words, within=(*ALONE, *INSIDE))
    _wait_for(lambda: metrics.exists() and '"loss"' in metrics.read_text(), first, seconds=200)
    script = next(
        process
        for process in psutil.Process(first.pid).children(recursive=True)
        if str(DEPLOY / "slurm.sh") in command_line(process).split()
    )
    script.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=200)
    assert first.returncode == 75, said
    assert real.requeued() == [f"requeue {real._job}"]
    assert sorted((tmp_path / "run/checkpoints").iterdir()), said
    then = real.start(words, restarts=1, within=(*ALONE, *INSIDE))
    said, _ = then.communicate(timeout=300)
    assert then.returncode == 0, said
    assert '"event": "resumed"' in metrics.read_text()
    assert '"step": 400' in metrics.read_text()
