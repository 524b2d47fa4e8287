"""Real servers on loopback: S3's of two kinds, moto (an emulator) and rclone (files); MLflow's."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from infra.native.postgres import free_port

BINARIES = Path(sys.executable).parent
KEY, SECRET = "tester", "a-secret-of-tests"


@dataclass(frozen=True)
class S3Server:
    """A running server and the environment in which a client finds it."""

    name: str
    environment: Mapping[str, str]

    def use(self, monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
        """Point boto3 at this server until the test ends; a change to None unsets a variable."""
        from ckptfuse.store.s3_client import client

        for name, value in {**self.environment, **changes}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        client.cache_clear()


@contextmanager
def moto(folder: Path) -> Iterator[S3Server]:
    """An emulator, in memory; it checks no secrets. ``folder`` is for its log."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    yield from _serve("moto", command, port, folder)


@contextmanager
def rclone(folder: Path, *flags: str) -> Iterator[S3Server]:
    """The folders in ``folder/served`` as buckets; ``flags`` are further ones of rclone's."""
    port = free_port()
    (folder / "served").mkdir(exist_ok=True)
    command = [
        str(BINARIES / "rclone"), "serve", "s3", "--config", os.devnull,
        "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", str(folder / "served"),
        *flags,
    ]  # fmt: skip
    yield from _serve("rclone", command, port, folder)


def _serve(name: str, command: list[str], port: int, folder: Path) -> Iterator[S3Server]:
    url, nothing = f"http://127.0.0.1:{port}", folder / "no-profiles"
    nothing.touch()  # the null device is no file to DVC's S3 client
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(url, server)
        yield S3Server(
            name,
            {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_CONFIG_FILE": str(nothing),
                "AWS_SHARED_CREDENTIALS_FILE": str(nothing),
                "NO_PROXY": "127.0.0.1",
            },
        )
    finally:
        server.terminate()
        server.wait(timeout=10)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        assert server.poll() is None, f"the server at {url} ended at once"
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except urllib.error.HTTPError:  # it answers, if only to refuse us
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"no answer from {url}")


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@dataclass
class TrackingServer:
    """``mlflow server``: a process group that is started, stopped, and killed as a test needs."""

    database: str
    artifacts: str
    log: Path
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Come up, with no credentials of S3's: artifacts do not go through it."""
        command = [
            str(BINARIES / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--backend-store-uri", self.database, "--default-artifact-root", self.artifacts,
            "--no-serve-artifacts", "--workers", "1",
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_"))}
        environment |= {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        _wait_for(f"{self.url}/health", self._process)

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP: it hangs, and takes connections all the same. SIGCONT: it goes on."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.wait()
