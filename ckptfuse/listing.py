"""Which folders of a bucket hold a checkpoint now: complete, not yet, or damaged.

A folder counts after three looks, each cheaper than the next::

    its name parses  ->  its files are there and settled  ->  every header fits its file

Nothing here reads weights: headers come by ranged reads. Of a bucket with very many checkpoints
only those are listed that are new or recent (`look_again`).
"""

import heapq
import re
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta

from ckptfuse.checkpoints import METADATA, Checkpoint, assemble, checkpoint_of, is_identity
from ckptfuse.errors import (
    AccessDenied,
    DamagedCheckpoint,
    IncompleteCheckpoint,
    MissingFile,
    StoreError,
)
from ckptfuse.layouts import read_layout
from ckptfuse.names import parse_name
from ckptfuse.records import CheckpointRecord, PassRecord, QuarantineRecord
from ckptfuse.store import Entry, FolderStore, Store

#: Folders that are listed at once: a store answers for several in the time that it takes for one.
LIST_THREADS = 8
#: Files that a trainer writes last: the Hugging Face Trainer, and every distributed checkpoint. Not
#: below the top: Accelerate writes the model's, and then the optimizer's, each with a .metadata.
WRITTEN_LAST = frozenset(["trainer_state.json", METADATA])
#: A checkpoint as its files were listed now, or as a record remembers it; and one that may be used.
Listed = Checkpoint | CheckpointRecord | QuarantineRecord
Healthy = Checkpoint | CheckpointRecord
#: The files of a folder, or why nobody knows them.
Folder = list[Entry] | AccessDenied


@dataclass(frozen=True, slots=True)
class Refused:
    """A folder with a checkpoint's name that is not (yet) one, and why."""

    checkpoint: Checkpoint
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What a bucket holds now, each kind as trained: what counts, and what does not.

    ``unread`` are those of which the store said nothing: whole or not, nobody knows.
    """

    complete: tuple[Listed, ...] = ()
    incomplete: tuple[Refused, ...] = ()
    unread: tuple[Refused, ...] = ()
    damaged: tuple[Refused, ...] = ()
    #: Signature -> architecture, of the checkpoints whose headers were read in this look.
    architectures: Mapping[str, str] = field(default_factory=dict)

    def between(self, first: int | None, last: int | None) -> "Listing":
        """What it holds from step ``first`` to ``last``, both included; None: no such limit."""

        def inside(checkpoint: Listed) -> bool:
            step = checkpoint.step
            return (first is None or step >= first) and (last is None or step <= last)

        return replace(
            self,
            complete=tuple(c for c in self.complete if inside(c)),
            incomplete=tuple(r for r in self.incomplete if inside(r.checkpoint)),
            unread=tuple(r for r in self.unread if inside(r.checkpoint)),
            damaged=tuple(r for r in self.damaged if inside(r.checkpoint)),
        )


@dataclass(frozen=True, slots=True)
class Conventions:
    """How a team's trainer names and finishes its checkpoints."""

    pattern: str | None = None
    marker: str | None = None
    settle_seconds: float = 30.0
    known: Container[str] = field(default_factory=frozenset)


def find(bucket: Store, conventions: Conventions) -> Listing:
    """List a bucket and sort its checkpoint folders by whether they count, and why not.

    Checkpoints whose signature is in ``conventions.known`` were looked into before; their headers
    are not read again: an unchanged bucket costs a listing of its files and one of its folders.
    """
    folders: dict[str, Folder] = dict(_folders(bucket.list()))
    # Where that shows no file there may be none yet, or this user may not look.
    bare = [name for name in bucket.folders() if name not in folders]
    return _sort_out(bucket, conventions, folders | _list_each(bucket, bare, conventions))


def look_again(
    bucket: Store,
    names: Sequence[str],
    conventions: Conventions,
    remembered: Mapping[str, Listed],
    recent: int,
) -> Listing:
    """What `find` would say, if the files of ``remembered`` (by folder) are as they were.

    ``names`` are the bucket's folders. One listing of each folder that is not remembered or is
    among the ``recent`` last in training. A checkpoint written over further back is not seen.
    """
    known = {name: remembered[name] for name in names if name in remembered}
    newest = heapq.nlargest(recent, known, key=lambda name: by_training(known[name]))
    for name in newest:
        del known[name]
    folders = _list_each(bucket, [name for name in names if name not in known], conventions)
    return _sort_out(bucket, conventions, folders, known.values())


def _list_each(bucket: Store, names: Iterable[str], conventions: Conventions) -> dict[str, Folder]:
    """One listing of each folder that has a checkpoint's name; those without files are left out."""

    def listed(name: str) -> Folder:
        try:
            return _folders(bucket.list(f"{name}/")).get(name, [])
        except AccessDenied as error:
            return error

    wanted = [name for name in names if parse_name(name, conventions.pattern) is not None]
    with ThreadPoolExecutor(LIST_THREADS) as pool:
        found = zip(wanted, pool.map(listed, wanted), strict=True)
        return {name: folder for name, folder in found if folder}


def _sort_out(
    bucket: Store,
    conventions: Conventions,
    folders: Mapping[str, Folder],
    known: Iterable[Listed] = (),
) -> Listing:
    complete: list[Listed] = list(known)
    incomplete: list[Refused] = []
    unread: list[Refused] = []
    damaged: list[Refused] = []
    architectures: dict[str, str] = {}
    for name, folder in folders.items():
        parsed = parse_name(name, conventions.pattern)
        if parsed is None:
            continue
        store = bucket.child(name)
        if isinstance(folder, AccessDenied):
            unread.append(Refused(checkpoint_of(store, name, parsed, ()), str(folder)))
            continue
        checkpoint = checkpoint_of(store, name, parsed, [e for e in folder if is_identity(e.path)])
        try:
            _check_settled(folder, conventions, local=isinstance(bucket, FolderStore))
            checkpoint = assemble(store, name, parsed, folder)
            if checkpoint.signature not in conventions.known:
                architectures[checkpoint.signature] = read_layout(checkpoint).architecture
            complete.append(checkpoint)
        except (IncompleteCheckpoint, MissingFile) as error:  # or deleted meanwhile
            incomplete.append(Refused(checkpoint, str(error)))
        except StoreError as error:
            unread.append(Refused(checkpoint, str(error)))
        except DamagedCheckpoint as error:
            damaged.append(Refused(checkpoint, str(error)))
    complete.sort(key=by_training)
    for refused in (incomplete, unread, damaged):
        refused.sort(key=lambda one: by_training(one.checkpoint))
    return Listing(tuple(complete), tuple(incomplete), tuple(unread), tuple(damaged), architectures)


def by_training(checkpoint: Listed | PassRecord) -> tuple[str, int, str]:
    """A key to sort by: stages one after the other, since each may count its steps from 0."""
    numbered = re.sub(r"\d+", lambda digits: digits[0].zfill(20), checkpoint.stage or "")
    return numbered, checkpoint.step, checkpoint.name


def _folders(listed: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Top-level folders and their files (paths relative)."""
    folders: dict[str, list[Entry]] = {}
    for entry in listed:
        name, _, path = entry.path.partition("/")
        if path:
            relative = Entry(path, entry.size, entry.version, entry.modified)
            folders.setdefault(name, []).append(relative)
    return folders


def _check_settled(entries: list[Entry], conventions: Conventions, *, local: bool) -> None:
    """Raise IncompleteCheckpoint while the trainer may still be adding files.

    A marker of the team's choice decides when there is one. In a folder, some files are known to
    be written last, so nothing newer than one of them means done. Otherwise files must have been
    quiet for a while: uploads arrive in any order.
    """
    present = {entry.path: entry for entry in entries}
    newest = max(entry.modified for entry in entries)
    last = [entry for entry in entries if entry.path in WRITTEN_LAST]
    if conventions.marker is not None:
        if conventions.marker not in present:
            raise IncompleteCheckpoint(f"waiting for the marker file {conventions.marker!r}")
        return
    if local and any(entry.modified >= newest for entry in last):
        return
    quiet = time.time() - newest
    if -quiet > conventions.settle_seconds:
        ahead = timedelta(seconds=round(-quiet))
        raise IncompleteCheckpoint(
            f"its newest file is dated {ahead} ahead of this machine's clock; counts when that is "
            f"{conventions.settle_seconds:g} s ago (watch.settle_seconds): is a clock wrong?"
        )
    if quiet < conventions.settle_seconds:
        raise IncompleteCheckpoint(
            f"last written {max(quiet, 0):.0f} s ago; counts after {conventions.settle_seconds:g} "
            "s of quiet (watch.settle_seconds)"
        )
