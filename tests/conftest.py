"""What the tests of the whole service share: a real small trajectory and a real Prefect server."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from flows.environment import prepare
from infra.native.postgres import FAST_SHUTDOWN, free_port, open_cluster
from tests.forked import run_forked
from tests.servers import moto_server, rclone_server  # noqa: F401 - fixtures

BINARIES = Path(sys.executable).parent
DOMAINS = ("python", "prose", "c")
TOKENS_PER_STEP = 2048


def pytest_configure(config: pytest.Config) -> None:
    """Settings that must stand before Prefect is imported, for us and for what we start.

    Prefect reads them once: so the server's address is chosen here, and the server started later
    by the first test that needs it. Test processes of pytest-xdist have them from the first one.
    """
    if "TESTS_OF_CKPTFUSE" in os.environ:
        return
    home = Path(tempfile.mkdtemp(prefix="ckptfuse-tests-"))
    home.chmod(0o711)  # the user postgres must be able to enter what lies in it
    config.add_cleanup(lambda: _clean_up(home))
    os.environ["TESTS_OF_CKPTFUSE"] = os.environ["PREFECT_HOME"] = str(home)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{free_port()}/api"
    os.environ["PATH"] = f"{BINARIES}{os.pathsep}{os.environ['PATH']}"
    # As a team names its own modules: what we start finds examples/ and tests/ there.
    own = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, own))
    os.environ["OMP_NUM_THREADS"] = "1"
    prepare(home)


def _clean_up(home: Path) -> None:
    with suppress(FileNotFoundError, ProcessLookupError):
        for server, how in json.loads((home / "servers" / "pids").read_text()):
            os.kill(server, how)
    shutil.rmtree(home, ignore_errors=True)


def shared(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of the test processes makes and all of them use."""
    folder = Path(os.environ["TESTS_OF_CKPTFUSE"], name)
    made = folder.with_name(f"{name}.made")
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def prefect_server() -> str:
    """A real Prefect server for all test processes; every process under us finds it."""
    shared("servers", _start_prefect_server)
    return os.environ["PREFECT_API_URL"]


def _start_prefect_server(folder: Path) -> None:
    """On PostgreSQL: on SQLite one of several writers at once may wait for a minute."""
    cluster = open_cluster(folder / "postgres")
    postgres = cluster.start(durable=False)
    cluster.create_database("prefect")
    url = os.environ["PREFECT_API_URL"]
    port = url.removesuffix("/api").rpartition(":")[2]
    server = subprocess.Popen(
        [BINARIES / "prefect", "server", "start", "--host", "127.0.0.1", "--port", port],
        env={
            **os.environ,
            "PREFECT_API_DATABASE_CONNECTION_URL": cluster.url("prefect", "postgresql+asyncpg"),
            "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    pids = [(server.pid, signal.SIGKILL), (postgres.pid, FAST_SHUTDOWN)]
    (folder / "pids").write_text(json.dumps(pids))
    _wait_for(f"{url}/health", server)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the Prefect server ended at once"
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"no answer from {url}")


@dataclass(frozen=True)
class Trajectory:
    """A pretraining that has ended: its bucket, and corpus files by domain."""

    bucket: Path
    corpus: dict[str, Path]

    def steps(self) -> list[int]:
        return sorted(int(path.name.partition("-")[2]) for path in self.bucket.iterdir())


@pytest.fixture(scope="session")
def texts() -> Path:
    """A folder with this machine's text: train.jsonl, tokenizer/ and a file per domain."""
    return shared("texts", _lay_texts)


def _lay_texts(folder: Path) -> None:
    from flows.demo.texts import gather, write_jsonl
    from flows.demo.trainer import train_tokenizer

    gathered = gather()
    write_jsonl(folder / "train.jsonl", gathered.train[: len(gathered.train) // 2])
    for name in DOMAINS:
        write_jsonl(folder / f"{name}.jsonl", gathered.domains[name])
    train_tokenizer(gathered.train, folder / "tokenizer", vocab_size=1024)


def _trainer(texts: Path, bucket: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The demo's trainer, small enough for a test, on a thread of its own."""
    command = [
        sys.executable, "-m", "flows.demo.trainer", "--bucket", str(bucket),
        "--texts", str(texts / "train.jsonl"), "--tokenizer", str(texts / "tokenizer"),
        "--hidden", "64", "--layers", "2", "--steps", "720", "--save-every", "60",
        "--warmup", "20", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


@dataclass(frozen=True)
class Trajectories:
    """Two runs from the same start, with six checkpoints each: steps 420 to 720.

    Those before are deleted, as trainers do: a merge of so early ones gains nothing yet.
    """

    constant: Trajectory  # the learning rate stays what it is
    decayed: Trajectory  # it falls to zero from step 480 to 720


@pytest.fixture(scope="session")
def trajectories(texts: Path) -> Trajectories:
    runs: dict[str, list[str]] = {"constant": [], "decayed": ["--decay-from", "480"]}

    def train(folder: Path) -> None:
        trainers = [_trainer(texts, folder / name, *more) for name, more in runs.items()]
        assert [trainer.wait() for trainer in trainers] == [0, 0]
        for early in (step for name in runs for step in (folder / name).iterdir()):
            if int(early.name.partition("-")[2]) < 420:
                shutil.rmtree(early)

    folder = shared("trajectories", train)
    corpus = {name: texts / f"{name}.jsonl" for name in DOMAINS}
    return Trajectories(**{name: Trajectory(folder / name, corpus) for name in runs})


@pytest.fixture(scope="session")
def trajectory(trajectories: Trajectories) -> Trajectory:
    """The one under a constant learning rate."""
    return trajectories.constant


def environment() -> dict[str, str]:
    """Ours, less what MLflow left in it when a test in this process used a project of its own."""
    left = ("MLFLOW_TRACKING", "MLFLOW_REGISTRY")
    return {k: v for k, v in os.environ.items() if not k.startswith(left)}


@dataclass(frozen=True)
class Project:
    """A folder with a params.yaml, as a user has it."""

    folder: Path
    trajectory: Trajectory

    @property
    def bucket(self) -> Path:
        return self.folder / "bucket"

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    @property
    def params_file(self) -> str:
        return str(self.folder / "params.yaml")

    def land(self, *steps: int) -> None:
        """Let these checkpoints of the trajectory appear in the bucket."""
        for step in steps:
            source = self.trajectory.bucket / f"checkpoint-{step}"
            shutil.copytree(source, self.bucket / source.name, copy_function=shutil.copy2)

    def cli(
        self, *arguments: str, status: int = 0, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line in the folder; its exit status must be ``status``."""
        surroundings = {**environment(), **extra}
        if any(name.startswith("PREFECT_") for name in extra):  # read when it is imported
            done = subprocess.run(
                [BINARIES / "ckptfuse", *arguments],
                cwd=self.folder,
                env=surroundings,
                capture_output=True,
                text=True,
                check=False,
            )
        else:
            done = run_forked("flows.cli:main", arguments, self.folder, surroundings)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done

    def records(self, kind: str) -> dict[str, dict[str, object]]:
        folder = self.workspace / "records" / kind
        return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}

    def plans(self) -> list[dict[str, Any]]:
        """The last revision of each window's plan."""
        found = sorted(self.records("plan").values(), key=lambda plan: int(str(plan["revision"])))
        return list({plan["window"]: plan for plan in found}.values())

    def git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self.workspace / "ledger"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def versions(self) -> list[tuple[str, str]]:
        """Version and fusion of everything registered."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.mlflow_uri, registry_uri=self.mlflow_uri)
        found = client.search_model_versions("name = 'trial'")
        return sorted((str(v.version), v.tags["ckptfuse.fusion"]) for v in found)

    def aliases(self) -> dict[str, str]:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.mlflow_uri, registry_uri=self.mlflow_uri)
        return {k: str(v) for k, v in client.get_registered_model("trial").aliases.items()}

    @property
    def mlflow_uri(self) -> str:
        return f"sqlite:///{self.workspace}/mlflow.db"


def make_project(folder: Path, trajectory: Trajectory, **overrides: object) -> Project:
    """A project with small budgets; ``overrides`` replace top-level sections of params.yaml."""
    values: dict[str, object] = {
        "trajectory": "trial",
        "corpus": {
            "domains": {name: {"path": str(path)} for name, path in trajectory.corpus.items()},
            "tokens": {"selection": 4_000, "audit": 8_000, "report": 4_000},
            "tokens_per_document": 512,
        },
        "scoring": {"block_length": 128, "threads": 1},
        "bucket": "bucket",
        **overrides,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bucket").mkdir(exist_ok=True)
    (folder / "workspace").mkdir(exist_ok=True)
    shutil.copy(shared("mlflow", _lay_mlflow) / "mlflow.db", folder / "workspace")
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    return Project(folder, trajectory)


def _lay_mlflow(folder: Path) -> None:
    """What MLflow makes of an absent file, in seconds: all its migrations, one after another."""
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()


@pytest.fixture
def project(tmp_path: Path, trajectory: Trajectory) -> Project:
    return make_project(tmp_path / "project", trajectory)


@pytest.fixture(scope="session")
def finished(prefect_server: str, trajectory: Trajectory) -> Project:
    """Four checkpoints landed and were fused, then two more. For tests that only look.

    Its path has a space, which MLflow's locations write as %20.
    """

    def run(folder: Path) -> None:
        from flows.watch import watch

        window = {"tokens_per_step": TOKENS_PER_STEP}
        project = make_project(folder, trajectory, window=window)
        project.land(420, 480, 540, 600)
        first = watch(project.params_file)
        assert (first.scored, first.published) == (4, 1), first
        project.land(660, 720)
        second = watch(project.params_file)
        assert (second.scored, second.published, second.skipped) == (2, 1, 1), second

    return Project(shared("finished run", run), trajectory)
