"""What unit tests share: a real tiny Llama, and two real S3 servers on loopback."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

BINARIES = Path(sys.executable).parent
KEY, SECRET = "tester", "a-secret-of-tests"


@dataclass(frozen=True)
class S3Server:
    """A running server and the environment in which a client finds it."""

    name: str
    environment: Mapping[str, str]

    def use(self, monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
        """Point boto3 at this server until the test ends; a change to None unsets a variable."""
        from ckptfuse import store

        for name, value in {**self.environment, **changes}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        store._client.cache_clear()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(name: str, command: list[str], port: int, folder: Path) -> Iterator[S3Server]:
    url = f"http://127.0.0.1:{port}"
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
                "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                "NO_PROXY": "127.0.0.1",
            },
        )
    finally:
        server.terminate()
        server.wait(timeout=10)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
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
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    yield from _serve("moto", command, port, tmp_path_factory.mktemp("moto"))


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    port = _free_port()
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "served").mkdir()
    command = [
        str(BINARIES / "rclone"), "serve", "s3", "--config", os.devnull,
        "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", str(folder / "served"),
    ]  # fmt: skip
    yield from _serve("rclone", command, port, folder)


@pytest.fixture
def moto_s3(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """moto, with a bucket named ``bucket``."""
    yield from _with_bucket(moto_server, monkeypatch)


@pytest.fixture
def rclone_s3(rclone_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """rclone, with a bucket named ``bucket``."""
    yield from _with_bucket(rclone_server, monkeypatch)


def _with_bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    from ckptfuse import store

    server.use(monkeypatch)
    names = [bucket["Name"] for bucket in store._client().list_buckets()["Buckets"]]
    if "bucket" not in names:
        store._client().create_bucket(Bucket="bucket")
    yield server
    store._client.cache_clear()


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints of one tiny Llama with tied embeddings, as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    paths = []
    for step in (100, 200, 300):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        path = folder / f"checkpoint-{step}"
        model.save_pretrained(path)
        paths.append(path)
    return paths
