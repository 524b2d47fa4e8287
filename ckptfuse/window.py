"""Which checkpoints a fusion may draw from.

A window ends at one checkpoint and reaches back over its ancestors in the same segment::

    generation 1   s100  s200  s300  s400          rolled back to 200 after 400
    generation 2               s300' s400'
    window of s400':  s100  s200  s300' s400'

A segment ends where the training setup changes (stage, configuration, tokenizer, architecture, or
a boundary declared in params.yaml); a window never spans two.
"""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckptfuse.checkpoints import Checkpoint
from ckptfuse.digests import digest
from ckptfuse.params import WindowParams
from ckptfuse.records import CheckpointRecord


@dataclass(frozen=True, slots=True)
class Window:
    """Healthy checkpoints, oldest first; the last one is the newest and names the window."""

    members: tuple[CheckpointRecord, ...]

    @property
    def newest(self) -> CheckpointRecord:
        return self.members[-1]

    @property
    def step(self) -> int:
        return self.newest.step


def window_key(newest: CheckpointRecord, science: str, corpus: str) -> str:
    """One decision is made for each newest checkpoint under one science on one corpus.

    Older members are not in the key: a trainer that deletes old checkpoints must not reopen
    decisions that were made while they were there. The plan record names them.
    """
    return digest([newest.fingerprint, newest.step, science, corpus])


def segment_of(*, stage: str | None, config: object, tokenizer: str, architecture: str) -> str:
    """Digest of the training setup as far as a checkpoint shows it."""
    return digest([stage, config, tokenizer, architecture])


def generation_of(
    checkpoint: Checkpoint, fingerprint: str, known: Iterable[CheckpointRecord]
) -> int:
    """The generation that a newly read checkpoint belongs to, from 1.

    A step at or below one that is already known, written after it, is a rollback and opens a new
    generation. The same bytes under a new signature (a copy, a touched file) change nothing.
    """
    newest = 1
    for record in known:
        if (record.fingerprint, record.step) == (fingerprint, checkpoint.step):
            return record.generation
        newest = max(newest, record.generation)
    rolled_back = any(
        record.generation == newest
        and record.step >= checkpoint.step
        and record.modified < checkpoint.modified
        for record in known
    )
    return newest + 1 if rolled_back else newest


def windows(healthy: Sequence[CheckpointRecord], params: WindowParams) -> list[Window]:
    """Every window of a trajectory, in the order of training."""
    starts = _generation_starts(healthy)
    ordered = in_order(healthy)
    found = []
    for newest in ordered:
        members = tuple(
            record for record in ordered if _is_ancestor(record, newest, starts, params.boundaries)
        )[-params.size :]
        if len(members) >= params.minimum:
            found.append(Window(members))
    return found


def in_order(records: Iterable[CheckpointRecord]) -> list[CheckpointRecord]:
    """By training; the same bytes of one step under two names (a copy) count once."""
    ordered = sorted(records, key=lambda record: (record.generation, record.step, record.name))
    first: dict[tuple[str, int], CheckpointRecord] = {}
    for record in ordered:
        first.setdefault((record.fingerprint, record.step), record)
    return list(first.values())


def _generation_starts(records: Iterable[CheckpointRecord]) -> dict[int, int]:
    starts: dict[int, int] = {}
    for record in records:
        starts[record.generation] = min(record.step, starts.get(record.generation, record.step))
    return starts


def _is_ancestor(
    record: CheckpointRecord,
    newest: CheckpointRecord,
    starts: Mapping[int, int],
    boundaries: Sequence[int],
) -> bool:
    """Whether training passed through ``record`` on its way to ``newest``, in one segment."""
    if record.segment != newest.segment or record.generation > newest.generation:
        return False
    if _part(record, boundaries) != _part(newest, boundaries):
        return False
    later = [start for g, start in starts.items() if record.generation < g <= newest.generation]
    return record.step < min([newest.step + 1, *later])


def _part(record: CheckpointRecord, boundaries: Sequence[int]) -> int:
    return bisect.bisect_right(sorted(boundaries), record.step)
