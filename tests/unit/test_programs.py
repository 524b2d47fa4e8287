"""Git as the service runs it: what it asks nobody answers, and what a person has set holds."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckptfuse.errors import PublicationError
from tasks.ledger import Ledger

REMOTE = "host:run.git"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger", patience=2)
    ledger.folder.mkdir()
    ledger.git("init", "--quiet", "--initial-branch=main")
    return ledger


def ssh(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Git run a script of ours as its ssh, as people do who have a key of their own for it."""
    program = folder / "ssh"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("GIT_SSH_COMMAND", shlex.quote(str(program)))
    monkeypatch.setenv("GIT_SSH_VARIANT", "simple")


def test_a_question_on_the_terminal_fails_a_push_and_holds_nobody_up(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh(tmp_path, "echo asked > $(dirname $0)/asked; read answer < /dev/tty", monkeypatch)
    program = (
        "import sys; from pathlib import Path; from tasks.ledger import Ledger\n"
        "Ledger(Path(sys.argv[1])).git('ls-remote', sys.argv[2])"
    )
    command = shlex.join([sys.executable, "-c", program, str(ledger.folder), REMOTE])
    on_a_terminal = ["script", "--quiet", "--command", command, "/dev/null"]
    done = subprocess.run(on_a_terminal, capture_output=True, text=True, check=False, timeout=60)
    assert "PublicationError: git ls-remote host:run.git" in done.stdout
    assert (tmp_path / "asked").exists(), "the person's own ssh"


def test_a_remote_that_hangs_is_given_up_and_nothing_is_left_running(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh(tmp_path, "echo $$ > $(dirname $0)/pid; exec sleep 600", monkeypatch)
    with pytest.raises(PublicationError, match=r"not done after 2 s.*without a question"):
        ledger.git("ls-remote", REMOTE)
    left = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    deadline = time.monotonic() + 10
    while left.exists() and " Z " not in left.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left.exists() or " Z " in left.read_text()


def test_a_hook_of_another_repository_does_not_lead_git_there(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"):
        monkeypatch.setenv(name, str(tmp_path / "another"))
    ledger.git("commit", "--quiet", "--allow-empty", "--message", "ours")
    assert ledger.git("rev-parse", "--absolute-git-dir") == str(ledger.folder / ".git")


def test_settings_that_are_given_to_git_in_the_environment_hold(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[run]\n    from = a file\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "run.with")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "a variable")
    assert ledger.git("config", "run.from") == "a file"
    assert ledger.git("config", "run.with") == "a variable"
