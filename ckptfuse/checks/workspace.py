"""The workspace: does its file system keep what the service rests on, and is there room?

Tried in a folder of its own inside the workspace, which is deleted at the end.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ckptfuse.checks.check import Check, failed, ok, warning

WRITES, LOCKS, LINKS, SPACE = (
    "workspace writes once",
    "workspace locks",
    "workspace links",
    "disk space",
)
#: Merged models that there should be room for: one being made, those that publication copies.
ROOM = 5
_MOVE = "move the workspace to a local disk, or to a network file system that does"
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse", "lustre", "ceph", "gpfs", "beegfs", "9p")


def workspace(root: Path) -> Iterator[Check]:
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".ckptfuse-doctor-", dir=root))
    try:
        yield _writes_once(folder)
        yield _locks(folder)
        yield _links(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _writes_once(folder: Path) -> Check:
    """A file is created once, and takes another's place at once: how records appear whole."""
    first, second = folder / "first", folder / "second"
    os.close(os.open(first, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        os.close(os.open(first, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        second.write_text("second")
        second.replace(first)
        if first.read_text() == "second" and not second.exists():
            said = "a file was created once only, and replaced at once"
            return ok(WRITES, f"{folder.parent}: {said} (tried, and deleted)")
        return failed(WRITES, f"{folder.parent}: a file did not take another's place", _MOVE)
    return failed(WRITES, f"{folder.parent}: a file could be created twice (O_EXCL)", _MOVE)


def _locks(folder: Path) -> Check:
    """The kernel's lock (flock) keeps a second writer out, and ends with its process."""
    one, other = FileLock(folder / "lock"), FileLock(folder / "lock")
    one.acquire(timeout=0)
    try:
        other.acquire(timeout=0)
    except Timeout:
        kind = file_system(folder)
        if kind.split(".")[0] in _NETWORK:
            return warning(
                LOCKS,
                f"a second lock was refused, here; {folder.parent} is on {kind}, and whether other "
                "machines see its locks was not tried",
                "let one machine run the watch, or make sure that the mount passes flock on (NFS: "
                "no local_lock=flock; Lustre: -o flock)",
            )
        return ok(LOCKS, f"a second lock was refused; {folder.parent} is on {kind}")
    finally:
        one.release()
    other.release()
    return failed(LOCKS, f"{folder.parent} let two hold one lock (flock)", _MOVE)


def _links(folder: Path) -> Check:
    (folder / "linked").write_text("x")
    try:
        os.link(folder / "linked", folder / "link")
    except OSError as error:
        return failed(LINKS, f"{folder.parent}: hard links are refused ({error})", _MOVE)
    said = "hard links are there: ledger and registry hold published weights without a copy"
    return ok(LINKS, f"{folder.parent}: {said}")


def file_system(path: Path) -> str:
    """The type of the file system that holds ``path``, as the kernel's list of mounts has it."""
    found, longest = "an unknown file system", -1
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if path.resolve().is_relative_to(point) and len(point) > longest:
            found, longest = kind, len(point)
    return found


def space(root: Path, model: int | None, *, keeps_all: bool) -> Check:
    """``model``: bytes of a merged model, None where no checkpoint is there to tell."""
    free = shutil.disk_usage(root).free
    if not model:
        return ok(SPACE, f"{free / 1e9:.1f} GB are free; no checkpoint tells yet how many it takes")
    room = free // model
    said = f"{free / 1e9:.1f} GB are free: room for {room} merged models of {model / 1e6:,.0f} MB"
    kept = "; every published one stays for good (retention in params.yaml)" if keeps_all else ""
    if room < 1:
        return failed(SPACE, said, f"make room at {root}, or put the workspace on another disk")
    if room < ROOM:
        return warning(SPACE, said + kept, "make room, or set retention.last and retention.every")
    return ok(SPACE, said + kept)
