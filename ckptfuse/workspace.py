"""The workspace: one folder that the service owns, and the one lock that guards it.

records/   the only state            models/   merged weights, by fusion id
ledger/    Git and DVC               cache/    blocks and digests, can be made again
held/      checkpoints kept          locks/    who is at work
tmp/       nothing that anyone needs  trajectory  the name of the one that all of it is of
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ckptfuse.errors import ConfigurationError, MissingFile
from ckptfuse.record_files import Records
from ckptfuse.store import FolderStore, remove_folder

_TRAJECTORY = "trajectory"


def make_folder(folder: Path) -> Path:
    """The folder, made if need be; raises ConfigurationError where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError, FileNotFoundError) as error:
        raise ConfigurationError(
            f"{folder}: no folder can be made there ({error.strerror}); correct `workspace`: a "
            "folder, or where one can be made"
        ) from error
    return folder


@dataclass(frozen=True, slots=True)
class Workspace:
    """``trajectory``: whose it is to be; None where one uses it in no trajectory's name."""

    root: Path
    trajectory: str | None = None

    @property
    def read_freely(self) -> list[Path]:
        """What no cap on reading covers. Not all of the root: a demo's bucket lies in it too."""
        return [self.root / name for name in ("records", "models", "cache", "held")]

    @property
    def records(self) -> Records:
        return Records(FolderStore(self.folder("records")))

    def check_trajectory(self) -> None:
        """Raise ConfigurationError when another trajectory's records are here.

        They say nothing of whose they are: two would be one another's windows and champions.
        """
        owner = self._owner()
        if self.trajectory is not None and owner not in (None, self.trajectory):
            raise ConfigurationError(
                f"{self.root} is the workspace of trajectory {owner!r}, and `trajectory` is "
                f"{self.trajectory!r}: give {self.trajectory!r} a `workspace` (or "
                f"CKPTFUSE_WORKSPACE) of its own, or correct `trajectory`; the name of one that is "
                "under way stays"
            )

    def _owner(self) -> str | None:
        try:
            return FolderStore(self.root).read(_TRAJECTORY).decode().strip()
        except MissingFile:
            return None

    def folder(self, name: str) -> Path:
        """A folder of the workspace, made if need be."""
        return make_folder(self.root / name)

    def model(self, fusion: str) -> Path:
        return self.folder("models") / fusion

    def held(self, fingerprint: str) -> Path | None:
        """The copy of a checkpoint that is held; None where there is none."""
        folder = self.root / "held" / "checkpoints" / fingerprint
        return folder if folder.is_dir() else None

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Be the one writer; yields False, at once, when another process is.

        The first writer leaves its trajectory's name; raises ConfigurationError for another's. The
        lock is the kernel's (flock): it ends with its process, however that ends.
        """
        lock = FileLock(self.folder("locks") / "writer.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            self._claim()
            self._sweep()
            yield True
        finally:
            lock.release()

    def _claim(self) -> None:
        self.check_trajectory()
        if self.trajectory is not None and self._owner() is None:
            FolderStore(self.root).write(_TRAJECTORY, f"{self.trajectory}\n".encode())

    def _sweep(self) -> None:
        """Delete what a killed writer left half made: no name that anyone was given."""
        for left in self.folder("tmp").iterdir():
            if left.is_dir():
                remove_folder(left)
            else:
                left.unlink()
