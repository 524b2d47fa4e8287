"""What the last look found and whether it came to its end, beside the records, for monitoring.

One file that each look writes over (``cache/look.json``). It is no state: no look reads what
another has found but to tell what is new, and without it monitoring knows less and the service
does the same. Nor does it need any server: when Prefect is down, no look begins, or none that found
something to do comes to its end (it begins twice, before its flow run and in it), and the file says
so.
"""

import time
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ckptfuse.errors import MissingFile
from ckptfuse.listing import Healthy, Listed, Listing
from ckptfuse.protocol import Numerics
from ckptfuse.store import FolderStore

_FILE = "look.json"


class Queued(BaseModel):
    """A complete checkpoint that was to be scored."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    signature: str
    step: int
    written: float  # seconds since the epoch


class Pending(BaseModel):
    """A checkpoint that was left for a later look, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    signature: str
    reason: str

    @classmethod
    def of(cls, checkpoint: Listed, reason: str) -> "Pending":
        return cls(name=checkpoint.name, signature=checkpoint.signature, reason=reason)


class Look(BaseModel):
    """The last look at the bucket. Times are seconds since the epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    begun: float
    ended: float | None = None  # when one last came to its end
    unfinished: int = 0  # looks that have begun since
    complete: int = 0  # checkpoints in the bucket
    incomplete: tuple[Pending, ...] = ()
    queue: tuple[Queued, ...] = ()
    held: tuple[Pending, ...] = ()  # checkpoints that could not be read or scored just now
    waits: str | None = None  # why a publication could not be finished just now
    corpus: str | None = None  # its digest: with the numerics it tells which losses are current
    tokenizer: str | None = None  # of the one that parameters name for all checkpoints
    numerics: Numerics | None = None


class LookFile:
    """Where the last look is told of, in ``folder`` (the workspace's ``cache/``)."""

    def __init__(self, folder: Path) -> None:
        self._store = FolderStore(folder)

    def last(self) -> Look | None:
        """None before the first look, or where something else was written."""
        try:
            return Look.model_validate_json(self._store.read(_FILE))
        except (MissingFile, ValidationError):
            return None

    def begin(self) -> None:
        last = self.last()
        self._tell(begun=time.time(), unfinished=last.unfinished + 1 if last else 1)

    def found(
        self,
        listing: Listing,
        due: Iterable[Healthy],
        *,
        corpus: str,
        tokenizer: str | None,
        numerics: Numerics,
    ) -> None:
        """What the bucket holds, and which of its checkpoints are due to be scored."""
        self._tell(
            complete=len(listing.complete),
            incomplete=tuple(Pending.of(r.checkpoint, r.reason) for r in listing.incomplete),
            queue=tuple(
                Queued(signature=c.signature, step=c.step, written=c.modified) for c in due
            ),
            corpus=corpus,
            tokenizer=tokenizer,
            numerics=numerics,
        )

    def end(self, *, held: tuple[Pending, ...], waits: str | None) -> None:
        self._tell(ended=time.time(), unfinished=0, held=held, waits=waits)

    def _tell(self, **changes: object) -> None:
        last = self.last() or Look(begun=0.0)
        self._store.write(_FILE, last.model_copy(update=changes).model_dump_json().encode())
