"""up, submit, status, logs, stop, down, and who may not: against a real Ray cluster on loopback."""

import json
import os
import re
import stat
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from clusters import ROOT, Cluster, cluster, command_line, own_address

from cluster import package, tracking
from cluster.errors import ConfigError

SECRET = "local-0123456789abcdef0123456789abcdef0123456789"


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("ray"), head_cpus=2) as made:
        yield made


def test_up_is_closed_by_default(ray: Cluster) -> None:
    token = ray.folder / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) >= 32
    assert "only this machine reaches it" in ray.said
    for process in ray.processes("head"):
        try:
            listening = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        addresses = {connection.laddr.ip for connection in listening}
        assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, (process.name(), addresses)
    again = ray.launch("up", f"folder={ray.folder / 'head'}")
    assert again.returncode == 2
    assert "a cluster is up already" in again.stderr
    other = ray.launch("up", f"folder={ray.folder / 'other'}", f"port={ray.port}")
    assert other.returncode == 2
    assert f"127.0.0.1:{ray.port}: Address already in use" in other.stderr


def test_nobody_without_the_token_submits_or_reads(ray: Cluster, tmp_path: Path) -> None:
    address = ray.env["RAY_API_SERVER_ADDRESS"]
    for path, data in (("/api/jobs/", None), ("/api/jobs/", b'{"entrypoint": "id"}'), ("/api/v0/nodes", None)):
        asked = urllib.request.Request(address + path, data=data, headers={"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(asked)
        assert refused.value.code in (401, 403), path
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    for words in (["status"], ["logs", "x"], ["stop", "x"], ["submit", "hospital", "out=/nowhere"]):
        for environment in ({"RAY_AUTH_TOKEN_PATH": str(wrong)}, {"HOME": str(tmp_path)}):
            done = ray.launch(*words, **environment)
            assert done.returncode == 3, (words, done.stdout, done.stderr)
            assert "the cluster does not take this token" in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1


def test_a_job_from_submit_to_logs(ray: Cluster, tmp_path: Path) -> None:
    """Its secrets reach it, and neither its command line nor any log."""
    job = ray.submit("hospital", f"out={tmp_path / 'hospital'}", "patients=5", WANDB_API_KEY=SECRET)
    assert job.startswith("hospital-")
    assert ray.wait(job) == "SUCCEEDED", ray.log(job)
    assert "synthetic hospital in" in ray.log(job)
    assert (tmp_path / "hospital" / "NOTEEVENTS.csv.gz").exists()
    assert job in ray.launch("status").stdout
    assert SECRET not in ray.log(job)
    lines = " ".join(map(command_line, ray.processes("head")))
    session = Path(re.findall(r"(/[^ =]*/session_[^/ ]+)", lines)[0])
    files = [path for path in (session / "logs").rglob("*") if path.is_file()]
    assert any(path.name.startswith("job-driver-") for path in files)
    held = [str(path) for path in files if SECRET.encode() in path.read_bytes()]
    assert held == []


def reach(ray: Cluster, job: str, run: Path, step: int) -> None:
    """Returns when the run has logged a step so far."""
    deadline = time.monotonic() + 240
    while not any(line["step"] >= step for line in tracking.read(str(run)) if "loss" in line):
        assert time.monotonic() < deadline, ray.log(job)
        time.sleep(0.5)


def shards_of(ray: Cluster, folder: Path) -> Path:
    """Shards of a small hospital, made by a job."""
    hospital, shards = folder / "hospital", folder / "shards"
    assert ray.launch("hospital", f"out={hospital}", "patients=120").returncode == 0
    words = ["shard", "recipes/demo/shard.toml", f"input={hospital}/NOTEEVENTS.csv.gz", f"output={shards}"]
    job = ray.submit(*words, "tokenizer.vocab_size=600")
    assert job.startswith("shard-demo-shard-")
    assert ray.wait(job) == "SUCCEEDED", ray.log(job)
    assert (shards / "manifest.json").exists()
    return shards


def test_shard_pretrain_finetune_stop_and_resume_as_jobs(ray: Cluster, tmp_path: Path) -> None:
    """Jobs join the cluster they run on; what was stopped goes on by `resume`."""
    shards, run = shards_of(ray, tmp_path), tmp_path / "run"
    small = ["model.hidden=32", "model.embedding=24", "tracking.wandb=disabled", "workers=2", "save_every=20"]
    words = ["pretrain", "recipes/demo/awd_lstm.toml", f"data.corpus={shards}", f"run_dir={run}", *small]
    job = ray.submit(*words, "epochs=40")
    reach(ray, job, run, 1)
    assert ray.row(job)[1:3] == ["pretrain", "RUNNING"]
    stopped = ray.launch("stop", job)
    assert f"{job}: STOPPED" in stopped.stdout, stopped.stderr
    assert "all is saved" in ray.log(job)
    saved = sorted((run / "checkpoints").iterdir())[-1]
    assert (saved / "manifest.json").exists()
    assert "nothing to stop" in ray.launch("stop", job).stderr
    first = int(saved.name[5:])
    resumed = ray.launch("resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    again = resumed.stdout.split("submitted ")[1].partition(";")[0]
    reach(ray, again, run, first + 1)
    follow = [ROOT / "launch.sh", "logs", again, "rank=1", "-f"]
    following = subprocess.Popen(follow, env=ray.env, stdout=subprocess.PIPE, text=True)
    assert ray.launch("stop", again).returncode == 0
    assert f"from step {first:,}" in ray.log(again)
    at, step, rate, loss, checkpoint, restarts, nodes = ray.row(again)[3:]
    assert at == "pretrain stopped"
    assert first < int(step.replace(",", "")) <= int(checkpoint.replace(",", ""))
    assert float(loss) > 0
    assert int(rate.replace(",", "")) > 0
    assert (restarts, nodes) == ("1", "1")
    ranks = {line.partition(":")[0] for line in ray.log(again).splitlines() if line.startswith("rank ")}
    assert ranks == {"rank 0", "rank 1"}
    of_one = following.communicate(timeout=60)[0].splitlines()  # it ends with the job
    assert of_one
    assert ray.launch("logs", again, "rank=1", "-f").stdout.splitlines() == of_one
    assert all(line.startswith("rank 1: ") for line in of_one)
    tuned = ray.submit(
        *("finetune", "recipes/demo/finetune.toml", f"run={run}", f"out={tmp_path / 'out'}", "seeds=[1]"),
        *(f"task.tables={tmp_path / 'hospital'}", "bootstrap_draws=20", "max_tokens=64"),
    )
    assert ray.wait(tuned) == "SUCCEEDED", ray.log(tuned)
    assert (tmp_path / "out" / "results.json").exists()


def test_a_failing_job_says_why_and_a_running_one_can_be_stopped(ray: Cluster, tmp_path: Path) -> None:
    failing = ray.submit("shard", "recipes/demo/shard.toml", f"input={tmp_path}/nothing.csv", f"output={tmp_path}/out")
    running = ray.submit("hospital", f"out={tmp_path / 'large'}", "patients=100000000")
    ray.wait(running, "RUNNING")
    assert ray.launch("stop", running).returncode == 0
    assert ray.wait(running) == "STOPPED"
    assert not (tmp_path / "large" / "NOTEEVENTS.csv.gz").exists()
    assert ray.wait(failing) == "FAILED"
    assert "nothing.csv: no such file" in ray.log(failing)
    assert "nothing.csv: no such file" in ray.launch("status", failing).stdout


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (["submit"], "submit what?", 2),
        (["submit", "hospitl"], "submit what?", 2),
        (["submit", "pretrain", "recipes/demo/awd_lstm.toml", "optim.lrr=1"], "no key 'optim.lrr'; the nearest is", 2),
        (["submit", "pretrain", "recipes/demo/nothing.toml"], "recipes/demo/nothing.toml: no such file", 2),
        (["submit", "pretrain", "recipes/demo/awd_lstm.toml", "workers=many"], "give a number of workers", 2),
        (["submit", "hospital", "out=x", "packages=some"], "give present", 2),
        (["submit", "hospital", "out=x", "cluster=http://127.0.0.1:1"], "no Ray cluster answers there", 3),
        (["resume"], "resume what?", 2),
        (["resume", "recipes"], "is not a run directory", 2),
        (["logs", "nothing"], "nothing: give the name of one job", 2),
        (["status", "nothing"], "the cluster knows no such job", 2),
        (["status", "cluster=http://127.0.0.1:1"], "no Ray cluster answers there", 3),
        (["down", "folder=nothing"], "no cluster of ./launch.sh up runs here", 2),
        (["up", "join=10.0.0.1:1", "folder=nothing", "HOME"], "no token; copy the file", 2),
        (["up", "join=127.0.0.1:1", "folder=nothing"], "a cluster on loopback is closed", 2),
        (["up", "join=OWN:1", "folder=nothing"], ":1: Connection refused; give HOST:PORT as ./launch.sh up said", 2),
    ],
)
def test_mistakes_are_one_line(ray: Cluster, tmp_path: Path, words: list[str], says: str, code: int) -> None:
    more = {"HOME": str(tmp_path)} if "HOME" in words else {}
    done = ray.launch(*(word.replace("OWN", own_address()) for word in words if word != "HOME"), **more)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_dry_run_shows_and_sends_nothing(ray: Cluster, tmp_path: Path) -> None:
    words = ["submit", "pretrain", "recipes/mimic3/awd_lstm.toml", "workers=4..16", f"run_dir={tmp_path}/run"]
    done = ray.launch(*words, "cluster=http://127.0.0.1:1", DRY_RUN="1", AWS_SECRET_ACCESS_KEY=SECRET)
    assert done.returncode == 0, done.stderr
    assert "would submit pretrain-mimic3-awd-lstm-" in done.stdout
    assert "python -m cluster.cli pretrain job.toml" in done.stdout
    assert 'workers = "4..16"' in done.stdout
    assert "AWS_SECRET_ACCESS_KEY" in done.stdout
    assert SECRET not in done.stdout


def test_what_is_shipped(tmp_path: Path) -> None:
    for name in (".git/x", "runs/x", "data/notes.csv", ".venv/x", "a/__pycache__/x.pyc", "pyproject.toml", "a/b.py"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text("x")
    assert [str(path) for path, _ in package.tree(tmp_path / "tree")] == ["pyproject.toml", "a/b.py"]
    for name in ("one.zip", "two.zip"):
        package.pack(tmp_path / name, b"seed = 1\n", tmp_path / "tree")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    large = tmp_path / "tree" / "notes.csv"
    large.touch()
    os.truncate(large, 101_000_000)
    with pytest.raises(ConfigError, match=r"101 MB would be shipped.* notes\.csv \(101 MB\)"):
        package.pack(tmp_path / "three.zip", None, tmp_path / "tree")
    assert not (tmp_path / "three.zip").exists()


def test_packages_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert package.mismatches() == []
    monkeypatch.setattr(package, "requirements", lambda: ["numpy<1", "no-such-package==1"])
    first, second = package.mismatches()
    assert first.startswith("numpy is ")
    assert second == "no-such-package==1 is missing"


def test_down_ends_what_up_started(tmp_path_factory: pytest.TempPathFactory) -> None:
    with cluster(tmp_path_factory.mktemp("ray"), head_cpus=1) as made:
        tree = made.processes("head")
        assert json.loads((made.folder / "head" / "node.json").read_text())["pid"] == tree[0].pid
        done = made.launch("down", f"folder={made.folder / 'head'}")
        assert done.returncode == 0, done.stderr
        assert psutil.wait_procs(tree, timeout=10)[1] == []
        assert "no cluster of ./launch.sh up runs here" in made.launch("down", f"folder={made.folder / 'head'}").stderr
