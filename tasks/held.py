"""Held checkpoints: copies of those that kept fusions were made of.

    held/checkpoints/<fingerprint>/   the files that a checkpoint's identity covers (without those
                                      of an optimizer, where they stand apart)
    held/<tag>/<name>                 links to them: the window of one fusion

Trainers delete old checkpoints. With ``versions.inputs: held`` a fusion can be made again all the
same: ``CKPTFUSE_BUCKET=<workspace>/held/<tag> dvc repro``. They are copies, since a hard link
would have whatever the trainer writes into its file.
"""

import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ckptfuse.checkpoints import fingerprint, open_checkpoint
from ckptfuse.errors import ChangedCheckpoint, CkptfuseError
from ckptfuse.fingerprints import READ_THREADS, copy_file
from ckptfuse.records import Member, PlanRecord
from ckptfuse.service import Service
from ckptfuse.store import FolderStore, remove_folder
from tasks.log import log

_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True)
class Cost:
    """What holding takes of the disk."""

    checkpoints: int
    bytes: int


def hold(service: Service, decided: PlanRecord, tag: str) -> None:
    """Copy a window's checkpoints, but for those that are held; one that is gone is told."""
    before = cost(service)
    window = _root(service) / tag
    window.mkdir(parents=True, exist_ok=True)
    for member in decided.members:
        try:
            _copy(service, member)
        except (CkptfuseError, OSError) as error:
            log.warning("checkpoint %s of %s cannot be held: %s", member.name, tag, error)
            continue
        link = window / member.name
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..", _CHECKPOINTS, member.fingerprint), target_is_directory=True)
    now = cost(service)
    log.info(
        "held for step %d: %d checkpoints more, %.1f MB; in all %d, %.1f MB",
        decided.step,
        now.checkpoints - before.checkpoints,
        (now.bytes - before.bytes) / 1e6,
        now.checkpoints,
        now.bytes / 1e6,
    )


def cost(service: Service) -> Cost:
    folders = _inside(_root(service) / _CHECKPOINTS)
    sizes = [path.stat().st_size for folder in folders for path in _files(folder)]
    return Cost(len(folders), sum(sizes))


def only_of(service: Service, tag: str, gone: Collection[str]) -> set[Path]:
    """The files of checkpoints that are held for this fusion, and for no other that stays."""
    root = _root(service)
    others = {folder.name for folder in _inside(root)} - {tag, *gone}
    needed = _named(root, *others)
    alone = _named(root, tag) - needed
    return {path for name in alone for path in _files(root / _CHECKPOINTS / name)}


def release(service: Service, tag: str) -> None:
    """Let go what was held for a fusion alone."""
    root = _root(service)
    remove_folder(root / tag)
    needed = _named(root, *(folder.name for folder in _inside(root)))
    for folder in _inside(root / _CHECKPOINTS):
        if folder.name not in needed:
            remove_folder(folder)


def _root(service: Service) -> Path:
    return service.workspace.root / "held"


def _files(folder: Path) -> set[Path]:
    """A distributed checkpoint has some of them a folder below."""
    return {path for path in folder.rglob("*") if path.is_file()}


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _named(root: Path, *tags: str) -> set[str]:
    """The fingerprints that the links of these fusions lead to."""
    links = (link for tag in tags if tag != _CHECKPOINTS for link in _inside(root / tag))
    return {link.readlink().name for link in links}


def _copy(service: Service, member: Member) -> None:
    if service.workspace.held(member.fingerprint) is not None:
        return
    checkpoint = open_checkpoint(service.placed(member).uri)
    source = checkpoint.store()
    with tempfile.TemporaryDirectory(dir=service.workspace.folder("tmp")) as folder:
        copied = FolderStore(Path(folder, "checkpoint"))
        with ThreadPoolExecutor(READ_THREADS) as pool:
            found = pool.map(lambda entry: copy_file(source, copied, entry), checkpoint.files)
            paths = (entry.path for entry in checkpoint.files)
            contents = dict(zip(paths, found, strict=True))
        if fingerprint(contents) != member.fingerprint:
            raise ChangedCheckpoint(f"{member.uri} was written again since it was merged")
        place = _root(service) / _CHECKPOINTS / member.fingerprint
        place.parent.mkdir(parents=True, exist_ok=True)
        copied.root.rename(place)
