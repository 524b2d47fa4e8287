"""Messages, which go into logs, records and pages, tell no password of an address."""

import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptfuse.checks import failed, ok, warning
from ckptfuse.errors import CkptfuseError
from ckptfuse.params import Params
from ckptfuse.passwords import without_passwords
from ckptfuse.service import open_service
from tasks.ledger import Ledger
from tasks.notify import checkpoint_written
from tasks.registry import registry_of
from tasks.tracking import require_answer

ADDRESS = "http://user:p@ss-word@127.0.0.1:1/x"
SHOWN = "http://...@127.0.0.1:1/x"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"fatal: '{ADDRESS}': refused", f"fatal: '{SHOWN}': refused"),
        ("https://ghp_token@github.com/a b@c", "https://...@github.com/a b@c"),
        ("git@github.com:team/run.git", "git@github.com:team/run.git"),
        ("s3://bucket/run of me@home", "s3://bucket/run of me@home"),
        ("http://localhost:5000/x@y", "http://localhost:5000/x@y"),
    ],
)
def test_what_stands_before_the_host_is_left_out(text: str, shown: str) -> None:
    assert without_passwords(text) == shown


def test_no_finding_tells_a_password() -> None:
    for check in (ok("a", ADDRESS), warning("a", ADDRESS, "mend"), failed("a", ADDRESS, "mend")):
        assert check.said == SHOWN


def _push(folder: Path) -> None:
    ledger = Ledger(folder)
    ledger.git("init", "--quiet")
    ledger.git("push", "--quiet", ADDRESS, "main")


def _mlflow(folder: Path) -> None:
    with registry_of(open_service(Params(trajectory="a", workspace=str(folder)))):
        raise OSError(f"API request to {ADDRESS} failed")


@pytest.mark.parametrize(
    "act",
    [
        _push,
        _mlflow,
        lambda folder: require_answer(ADDRESS),
        lambda folder: checkpoint_written("run"),
    ],
)
def test_no_error_tells_a_password_nor_does_what_it_came_from(
    act: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", ADDRESS)
    with pytest.raises(CkptfuseError) as told:
        act(tmp_path)
    logged = logging.Formatter().formatException((told.type, told.value, told.value.__traceback__))
    assert "://...@127.0.0.1:1/x" in str(told.value)
    for text in (str(told.value), logged):
        assert "ss-word" not in text, text


def test_a_ledger_that_goes_on_tells_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = Ledger(tmp_path / "made")
    made.prepare(None)
    subprocess.run(["git", "init", "--quiet", "--bare", tmp_path / "remote"], check=True)
    made.git("push", "--quiet", str(tmp_path / "remote"), "main")
    (tmp_path / ".gitconfig").write_text(f'[url "{tmp_path}/remote"]\n    insteadOf = {ADDRESS}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    Ledger(tmp_path / "again").prepare(ADDRESS)
    assert SHOWN in caplog.text
    assert "ss-word" not in caplog.text
