"""The ledger's repository, as people and killed programs leave it."""

import subprocess
from pathlib import Path

import pytest

from ckptfuse.errors import PublicationError
from ckptfuse.params import LedgerParams
from tasks.ledger import Ledger, LedgerEntry


def test_a_file_that_somebody_put_there_is_in_no_commit(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ledger = Ledger(tmp_path)
    ledger.prepare(None)
    assert ledger.git("ls-files").split() == [
        ".dvc/.gitignore", ".dvc/config", ".dvcignore", ".gitignore",
    ]  # fmt: skip
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_locks_of_a_killed_git_are_in_nobodys_way(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.prepare(None)
    for name in ("index.lock", "HEAD.lock", "refs/heads/main.lock", "refs/tags/step-1.lock"):
        (tmp_path / ".git" / name).touch()
    ledger.prepare(None)
    ledger.git("commit", "--quiet", "--allow-empty", "--message", "it goes on")
    ledger.git("tag", "--annotate", "step-1", "--message", "so do tags")
    assert ledger.git("log", "--format=%s", "-1") == "it goes on"


def test_a_new_ledger_begins_on_top_of_what_its_remote_has(tmp_path: Path) -> None:
    remote, made = tmp_path / "remote", Ledger(tmp_path / "made")
    subprocess.run(["git", "init", "--quiet", "--bare", remote], check=True)
    made.prepare(str(remote))  # which is empty
    made.git("tag", "--annotate", "step-1", "--message", "one")
    made.git("push", "--quiet", "--follow-tags", str(remote), "main")
    again = Ledger(tmp_path / "again")
    again.prepare(str(remote))
    assert again.git("rev-parse", "HEAD", "step-1") == made.git("rev-parse", "HEAD", "step-1")
    assert (again.folder / ".dvc" / "config").is_file()


def test_a_remote_that_a_host_made_with_a_readme_can_be_pushed_to(tmp_path: Path) -> None:
    remote, host = tmp_path / "remote", Ledger(tmp_path / "host")
    subprocess.run(["git", "init", "--quiet", "--bare", remote], check=True)
    host.folder.mkdir()
    host.git("init", "--quiet", "--initial-branch=main")
    (host.folder / "README.md").write_text("created with the repository")
    host.git("add", "README.md")
    host.git("commit", "--quiet", "--message", "Initial commit")
    host.git("push", "--quiet", str(remote), "main")
    ledger = Ledger(tmp_path / "ledger")
    ledger.prepare(str(remote))
    ledger.git("push", "--quiet", str(remote), "main")
    assert {"README.md", ".dvc/config"} < set(ledger.git("ls-files").split())


def test_a_push_that_is_refused_leaves_no_tag_behind(tmp_path: Path) -> None:
    remote, other = tmp_path / "remote", Ledger(tmp_path / "other")
    subprocess.run(["git", "init", "--quiet", "--bare", remote], check=True)
    ledger = Ledger(tmp_path / "ledger")
    ledger.prepare(None)
    other.prepare(None)
    (other.folder / "README.md").write_text("another history")
    other.git("add", "README.md")
    other.git("commit", "--quiet", "--message", "another history")
    other.git("push", "--quiet", str(remote), "main")
    ledger.git("tag", "--annotate", "step-1", "--message", "one")
    entry = LedgerEntry("step-1", ledger.git("rev-parse", "HEAD"), "")
    with pytest.raises(PublicationError, match="rejected"):
        ledger._push(LedgerParams(remote=str(remote)), entry)
    assert ledger.git("ls-remote", "--tags", str(remote)) == ""
