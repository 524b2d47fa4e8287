"""Which checkpoints a fusion may draw from.

A window ends at one checkpoint and reaches back over its ancestors in the same segment::

    generation 1   s100  s200  s300  s400          rolled back to 200 after 400
    generation 2               s300' s400'
    window of s400':  s100  s200  s300' s400'

A segment ends where the training setup changes (stage, configuration, tokenizer, architecture, or
a boundary declared in params.yaml); a window never spans two. Within it, a window reaches back over
so many checkpoints, steps or tokens, and may leave out those that lie closer than a spacing.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ckptfuse.checkpoints import Checkpoint
from ckptfuse.digests import digest
from ckptfuse.errors import ConfigurationError
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
    generation; so does a stage that counts its steps anew. The same bytes under a new signature (a
    copy, a touched file) change nothing.
    """
    records = list(known)
    for record in records:
        if (record.fingerprint, record.step) == (fingerprint, checkpoint.step):
            return record.generation
    before = [record for record in records if record.stage == checkpoint.stage] or records
    newest = max((record.generation for record in before), default=1)
    rolled_back = any(
        record.generation == newest
        and record.step >= checkpoint.step
        and record.modified < checkpoint.modified
        for record in before
    )
    return newest + 1 if rolled_back else newest


def windows(
    healthy: Sequence[CheckpointRecord],
    params: WindowParams,
    wanted: Callable[[CheckpointRecord], bool] = lambda newest: True,
    *,
    known: Iterable[CheckpointRecord] = (),
) -> list[Window]:
    """Every window of a trajectory whose newest checkpoint is wanted, in the order of training.

    ``known`` are the checkpoints that there ever were, healthy or gone: the first one after a
    rollback tells where that went back to, whatever became of it. Raises ConfigurationError where
    ``window.span_tokens`` is set and tokens are not known.
    """
    found = []
    for line in lineages(healthy, params.boundaries, known=known):
        if wanted(line[-1]):
            members = _members(line, params)
            if len(members) >= params.minimum:
                found.append(Window(members))
    return found


def lineages(
    records: Iterable[CheckpointRecord],
    boundaries: Sequence[int] = (),
    *,
    known: Iterable[CheckpointRecord] = (),
) -> Iterator[Sequence[CheckpointRecord]]:
    """For each checkpoint, in the order of training: its ancestors in its segment, and last it.

    ``known`` as in `windows`. Each is good until the next one is asked for: they share a list, so
    that ten thousand checkpoints take ten thousand steps and not their square.
    """
    ordered = in_order(records)
    cuts = sorted(boundaries)
    starts = _generation_starts([*ordered, *known])
    lines: dict[tuple[str, int], list[CheckpointRecord]] = {}
    generation = 0
    for newest in ordered:
        if newest.generation != generation:  # what is later than the rollback is no ancestor
            generation = newest.generation
            for line in lines.values():
                line[:] = [record for record in line if record.step < starts[generation]]
        line = lines.setdefault((newest.segment, bisect.bisect_right(cuts, newest.step)), [])
        line.append(newest)
        yield line


def _members(
    line: Sequence[CheckpointRecord], params: WindowParams
) -> tuple[CheckpointRecord, ...]:
    """Of a lineage the newest that the parameters' limits let in, oldest first."""
    newest = line[-1]
    members = [newest]
    for record in itertools.islice(reversed(line), 1, None):
        if len(members) == params.size or not _is_within(record, newest, params):
            break
        if members[-1].step - record.step >= params.spacing:
            members.append(record)
    return tuple(reversed(members))


def _is_within(record: CheckpointRecord, newest: CheckpointRecord, params: WindowParams) -> bool:
    if params.span_steps is not None and newest.step - record.step > params.span_steps:
        return False
    if params.span_tokens is None:
        return True
    return _tokens(newest, params) - _tokens(record, params) <= params.span_tokens


def _tokens(record: CheckpointRecord, params: WindowParams) -> float:
    tokens = tokens_of(record, params)
    if tokens is None:
        raise ConfigurationError(
            f"window.span_tokens is set, but {record.name!r} does not say its tokens (as "
            "step1000-tokens4B does); set window.tokens_per_step"
        )
    return tokens


def tokens_of(record: CheckpointRecord, params: WindowParams) -> float | None:
    """Tokens seen in training until this checkpoint; None when neither name nor params say."""
    if record.tokens is not None:
        return record.tokens
    return params.tokens_per_step and record.step * params.tokens_per_step


def in_order(records: Iterable[CheckpointRecord]) -> list[CheckpointRecord]:
    """By training, one of each step: of the same bytes under two names (a copy) the first.

    Of other bytes (converted again, say) the one that was written last.
    """
    ordered = sorted(records, key=lambda record: (record.generation, record.step, record.name))
    first: dict[tuple[str, int], CheckpointRecord] = {}
    for record in ordered:
        first.setdefault((record.fingerprint, record.step), record)
    last: dict[tuple[int, str, int], CheckpointRecord] = {}
    for record in first.values():
        place = (record.generation, record.segment, record.step)
        last[place] = max(last.get(place, record), record, key=lambda one: (one.modified, one.name))
    return list(last.values())


def _generation_starts(records: Iterable[CheckpointRecord]) -> dict[int, int]:
    starts: dict[int, int] = {}
    for record in records:
        starts[record.generation] = min(record.step, starts.get(record.generation, record.step))
    return starts
