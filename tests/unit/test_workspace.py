"""The workspace: one writer at a time, and nothing half made left lying about."""

import subprocess
import sys
from pathlib import Path

import pytest

from ckptfuse.errors import ConfigurationError
from ckptfuse.params import Params
from ckptfuse.records import SkipRecord
from ckptfuse.service import Service, open_service
from ckptfuse.workspace import Workspace

_HOLD = """
import sys
from pathlib import Path
from ckptfuse.workspace import Workspace
with Workspace(Path(sys.argv[1])).lock() as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def hold(root: Path) -> subprocess.Popen[str]:
    """A process that takes the lock, says whether it got it, and keeps it until it is ended."""
    return subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_second_writer_is_told_at_once_and_the_lock_ends_with_its_holder(
    tmp_path: Path,
) -> None:
    holder = hold(tmp_path)
    try:
        assert said(holder) == "True"
        with Workspace(tmp_path).lock() as mine:
            assert not mine
    finally:
        holder.kill()
        holder.communicate()
    with Workspace(tmp_path).lock() as mine:
        assert mine


def test_a_lock_can_be_taken_again_after_it_was_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with Workspace(tmp_path).lock() as mine:
            assert mine


def test_the_new_writer_sweeps_up_what_a_killed_one_left(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    kept = workspace.model("fusion")
    half = workspace.folder("models") / ".fusion-123" / "model.safetensors"  # to be taken up again
    left = [workspace.folder("tmp") / "file", workspace.folder("tmp") / "folder" / "file"]
    for path in [kept / "model.safetensors", half, *left]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        path.chmod(0o444)
    with workspace.lock() as mine:
        assert mine
    assert [path for path in left if path.exists()] == []
    assert not left[1].parent.exists()
    assert half.exists()
    assert (kept / "model.safetensors").exists()


def test_who_does_not_get_the_lock_sweeps_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with workspace.lock():
        at_work = workspace.folder("tmp") / "of-the-one-at-work"
        at_work.touch()
        with Workspace(tmp_path).lock() as mine:
            assert not mine
        assert at_work.exists()


def test_records_need_no_folder_to_be_there_first(tmp_path: Path) -> None:
    records = Workspace(tmp_path / "new").records
    assert records.all(SkipRecord) == {}
    records.put("a", SkipRecord(window="w", step=1, reason=""))
    assert (tmp_path / "new" / "records" / "skip" / "a.json").is_file()


def opened(root: Path, trajectory: str) -> Service:
    return open_service(Params(trajectory=trajectory, workspace=str(root)))


def test_a_workspace_takes_the_name_of_its_first_writer_and_refuses_another(
    tmp_path: Path,
) -> None:
    one, other = opened(tmp_path, "one"), opened(tmp_path, "other")
    with opened(tmp_path, "one").workspace.lock() as mine:
        assert mine
    with pytest.raises(ConfigurationError, match=r"trajectory 'one', .* 'other'"):
        opened(tmp_path, "other")
    with pytest.raises(ConfigurationError), other.workspace.lock():
        pytest.fail("it was opened before the first writer came")
    with one.workspace.lock() as mine:
        assert mine, "whoever is refused lets the lock go"


def test_who_only_looks_leaves_no_name(tmp_path: Path) -> None:
    opened(tmp_path / "new", "one")
    assert not (tmp_path / "new").exists()
    opened(tmp_path / "new", "other")


def test_who_works_in_no_trajectorys_name_is_let_in(tmp_path: Path) -> None:
    for workspace in (Workspace(tmp_path, "one"), Workspace(tmp_path)):
        workspace.check_trajectory()
        with workspace.lock() as mine:
            assert mine
    assert (tmp_path / "trajectory").read_text() == "one\n"
