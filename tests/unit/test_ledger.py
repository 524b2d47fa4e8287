"""The ledger's repository, as people and killed programs leave it."""

from pathlib import Path

from tasks.ledger import Ledger


def test_a_file_that_somebody_put_there_is_in_no_commit(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ledger = Ledger(tmp_path)
    ledger.prepare()
    assert ledger.git("ls-files").split() == [
        ".dvc/.gitignore", ".dvc/config", ".dvcignore", ".gitignore",
    ]  # fmt: skip
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_locks_of_a_killed_git_are_in_nobodys_way(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.prepare()
    for name in ("index.lock", "HEAD.lock", "refs/heads/main.lock", "refs/tags/step-1.lock"):
        (tmp_path / ".git" / name).touch()
    ledger.prepare()
    ledger.git("commit", "--quiet", "--allow-empty", "--message", "it goes on")
    ledger.git("tag", "--annotate", "step-1", "--message", "so do tags")
    assert ledger.git("log", "--format=%s", "-1") == "it goes on"
