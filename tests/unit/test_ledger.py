"""The ledger's repository, as people and killed programs leave it."""

import subprocess
import sys
from pathlib import Path

import pytest

from ckptfuse.errors import PublicationError
from ckptfuse.params import LedgerParams
from tasks.ledger import Ledger, LedgerEntry
from tests.helpers import read_only


def test_a_file_that_somebody_put_there_is_in_no_commit(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ledger = Ledger(tmp_path)
    ledger.prepare(None)
    assert ledger.git("ls-files").split() == [
        ".dvc/.gitignore", ".dvc/config", ".dvcignore", ".gitignore",
    ]  # fmt: skip
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_dvc_writes_to_no_folder_of_the_systems(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tasks.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1])); ledger.prepare(None)\n"
        "(ledger.folder / 'corpus').mkdir(); (ledger.folder / 'corpus' / 'a').write_text('a')\n"
        "ledger.dvc('add', 'corpus')"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(
        read_only(Path("/var/tmp"), command), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "corpus.dvc").is_file()
    notes = tmp_path / ".git" / "dvc"
    assert list(notes.iterdir())
    assert notes.stat().st_mode & 0o077 == 0


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


def publish(ledger: Ledger, name: str, params: LedgerParams) -> LedgerEntry:
    """As ``Ledger.enter`` does with a fusion; here one of a single file."""
    ledger.prepare(params.remote)
    ledger._configure(params.dvc_remote)
    for path, text in (("model", name), ("corpus", "text")):
        (ledger.folder / path).unlink(missing_ok=True)  # a link into the cache
        (ledger.folder / path).write_text(text)
    ledger.dvc("add", "corpus")
    (ledger.folder / "dvc.yaml").write_text("stages: {fuse: {cmd: 'true', outs: [model]}}")
    ledger.dvc("commit", "--force")
    ledger._add()
    ledger.git("commit", "--quiet", "--message", name)
    ledger.git("tag", "--annotate", name, "--message", name)
    entry = ledger.find(name)
    assert entry is not None
    ledger._push(params, entry)
    return entry


def test_remotes_that_are_set_later_get_what_was_published_before(tmp_path: Path) -> None:
    remote, store = tmp_path / "remote.git", tmp_path / "store"
    subprocess.run(["git", "init", "--quiet", "--bare", remote], check=True)
    ledger = Ledger(tmp_path / "ledger")
    entries = [publish(ledger, name, LedgerParams()) for name in ("step-1", "step-2")]
    ledger.git("tag", "a-persons", "main~2")  # of no fusion
    later = LedgerParams(remote=str(remote), dvc_remote=str(store))
    entries.append(publish(ledger, "step-3", later))
    there = ledger.git("ls-remote", "--tags", "--refs", str(remote)).split()[1::2]
    assert there == [f"refs/tags/{n}" for n in ("step-1", "step-2", "step-3")]
    places = [store / "files" / "md5" / e.weights_hash[:2] / e.weights_hash[2:] for e in entries]
    assert [place.read_text() for place in places] == ["step-1", "step-2", "step-3"]
    assert (ledger.folder / "model").read_text() == "step-3"
    places[0].unlink()
    publish(ledger, "step-4", later)
    assert not places[0].exists(), "what was pushed once is not asked for again"
