"""What a trainer meets when it tells of a checkpoint and no such server answers."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckptfuse.errors import CkptfuseError
from tasks.notify import checkpoint_written
from tasks.trainer_callback import NotifyCallback


@pytest.fixture
def tls_port() -> Iterator[int]:
    """Answers HTTP with what a TLS server says to it: an alert."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with suppress(OSError), server.accept()[0] as connection:  # or nobody has asked
                connection.recv(65536)
                connection.sendall(b"\x15\x03\x01\x00\x02\x02\x16")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/api",  # where a TLS server listens
        "http://127.0.0.1:1/api",
        "127.0.0.1:4200/api",
        "prefect/api",
        "http://prefect :4200/api",
        "http://127.0.0.1:port/api",
        "http://[::1/api",
        "",
    ],
)
def test_a_wrong_address_ends_no_training(
    url: str, tls_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url.format(port=tls_port))
    state = SimpleNamespace(is_world_process_zero=True, global_step=100)
    NotifyCallback("run").on_save(SimpleNamespace(output_dir="/bucket"), state, None)
    assert "PREFECT_API_URL" in caplog.text
    assert "the service's schedule looks instead" in caplog.text


def test_a_loop_may_name_the_checkpoint_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with pytest.raises(CkptfuseError, match="refused"):
        checkpoint_written("run", uri=Path("/bucket/checkpoint-100"))
