"""plan(listing, state, params) -> actions: one pure function that decides what is to be done.

Watch, backfill and study use it alike. It decides from steps and records and not from timing, so
the same bucket and records always give the same actions, whoever asks and how often.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ckptfuse.listing import Healthy, Listed, Listing, by_training
from ckptfuse.params import Params, ScoringParams, WindowParams
from ckptfuse.records import (
    CheckpointRecord,
    GateRecord,
    PassRecord,
    PublicationRecord,
    QuarantineRecord,
    SkipRecord,
)
from ckptfuse.window import Window, in_order, window_key, windows

#: How the reason of a window begins that was not fused since a newer one was.
SUPERSEDED = "superseded by"


@dataclass(frozen=True)
class State:
    """What the records say. Checkpoints and quarantines by signature, the rest by window."""

    corpus: str
    checkpoints: Mapping[str, CheckpointRecord] = field(default_factory=dict)
    scored: frozenset[str] = frozenset()  # signatures whose every split has a score
    held: frozenset[str] = frozenset()  # signatures that could not be read just now
    delayed: frozenset[str] = frozenset()  # windows that could not be published just now
    passed: Mapping[str, PassRecord] = field(default_factory=dict)  # by signature
    affordable: int | None = None  # checkpoints that the day's scoring budget allows; None: all
    quarantined: Mapping[str, QuarantineRecord] = field(default_factory=dict)
    gates: Mapping[str, GateRecord] = field(default_factory=dict)
    skips: Mapping[str, SkipRecord] = field(default_factory=dict)
    publications: Mapping[str, PublicationRecord] = field(default_factory=dict)
    retired: frozenset[str] = frozenset()  # fusions that retention let go

    def is_closed(self, window: str) -> bool:
        """Whether nothing is left to do for this window."""
        if window in self.skips or window in self.publications:
            return True
        gate = self.gates.get(window)
        return gate is not None and (gate.verdict == "declined" or gate.fusion in self.retired)


@dataclass(frozen=True, slots=True)
class Quarantine:
    checkpoint: Listed
    architecture: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Skip:
    window: str
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Fuse:
    key: str
    window: Window


@dataclass(frozen=True, slots=True)
class Actions:
    """What is to be done, in this order. ``publish`` are windows whose gate said so before.

    ``passed`` are checkpoints that `scoring.every` leaves without a score: only to be remembered.

    Those judged under other parameters or on other text are skipped: what was measured for them
    is no evidence beside what is measured now.

    ``notes`` say what is left undone to keep to params' limits; ``due`` are all checkpoints that
    wait for a score, those that the limits let be scored now among them.
    """

    quarantine: tuple[Quarantine, ...] = ()
    score: tuple[Healthy, ...] = ()
    publish: tuple[str, ...] = ()
    skip: tuple[Skip, ...] = ()
    fuse: tuple[Fuse, ...] = ()
    notes: tuple[str, ...] = ()
    due: tuple[Healthy, ...] = ()
    passed: tuple[Healthy, ...] = ()

    def __bool__(self) -> bool:
        return any((self.quarantine, self.score, self.publish, self.skip, self.fuse))


def plan(listing: Listing, state: State, params: Params, *, live: bool = True) -> Actions:
    """Decide. While checkpoints are to be scored nothing is fused: ask again when they are.

    ``live``: of several waiting windows only the newest is fused, the others are superseded;
    otherwise (backfill) each is, in the order of training.
    """
    quarantine = _to_quarantine(listing, state, params.window.boundaries)
    excluded = (
        {item.checkpoint.signature for item in quarantine} | state.quarantined.keys() | state.held
    )
    present = [
        c
        for c in listing.complete
        if c.signature not in excluded and not isinstance(c, QuarantineRecord)
    ]
    due, passed = _every(present, state, params.scoring.every)
    score, notes = _to_score(due, passed, state, params.scoring)
    if quarantine or score:
        return Actions(quarantine=quarantine, score=score, notes=notes, due=due, passed=passed)
    healthy = [state.checkpoints[c.signature] for c in present if c.signature in state.scored]
    science = params.scientific_digest()

    def key(newest: CheckpointRecord) -> str:
        return window_key(newest, science, state.corpus)

    publish, overtaken = _to_publish(state, key)
    fuse, superseded = _to_fuse(healthy, state, params.window, key, live=live)
    skip = (*overtaken, *superseded)
    return Actions(publish=publish, skip=skip, fuse=fuse, notes=notes, due=due, passed=passed)


def _to_fuse(
    healthy: Sequence[CheckpointRecord],
    state: State,
    params: WindowParams,
    key: Callable[[CheckpointRecord], str],
    *,
    live: bool,
) -> tuple[tuple[Fuse, ...], tuple[Skip, ...]]:
    """The windows that wait for a decision; live, the newest, unless a later one is decided.

    Checkpoints may be scored in another order than that of training (a budget takes the newest
    first): what is fused then must not be older than what was.
    """
    decided: list[CheckpointRecord] = []  # in the order of training

    def waits(newest: CheckpointRecord) -> bool:
        window = key(newest)
        is_decided = window in state.gates or state.is_closed(window)
        if is_decided:
            decided.append(newest)
        return not is_decided

    found = windows(healthy, params, waits, known=state.checkpoints.values())
    waiting = [Fuse(key(window.newest), window) for window in found]
    if not live or not waiting:
        return tuple(waiting), ()
    newest = in_order([*decided[-1:], waiting[-1].window.newest])[-1]
    return (
        tuple(item for item in waiting if item.window.newest is newest),
        tuple(
            Skip(item.key, item.window.step, f"{SUPERSEDED} {newest.name}")
            for item in waiting
            if item.window.newest is not newest
        ),
    )


def _to_publish(
    state: State, key: Callable[[CheckpointRecord], str]
) -> tuple[tuple[str, ...], tuple[Skip, ...]]:
    """The windows that passed the gate and wait, in the order of its tests; those overtaken."""
    waiting = [
        window
        for window, gate in sorted(state.gates.items(), key=lambda item: item[1].test)
        if gate.verdict == "publish" and not state.is_closed(window)
    ]
    if not waiting:
        return (), ()
    present = {key(checkpoint) for checkpoint in state.checkpoints.values()}
    overtaken = "passed the gate, but waited until parameters or text had changed"
    return (
        tuple(w for w in waiting if w in present and w not in state.delayed),
        tuple(Skip(w, state.gates[w].step, overtaken) for w in waiting if w not in present),
    )


def _to_score(
    due: Sequence[Healthy],
    passed: Sequence[Healthy],
    state: State,
    params: ScoringParams,
) -> tuple[tuple[Healthy, ...], tuple[str, ...]]:
    """Which checkpoints to score, in the order of training, and what is not scored and why."""
    notes = []
    if passed:
        notes.append(f"{len(passed)} checkpoints are passed over: scoring.every is {params.every}")
    if state.affordable is None or len(due) <= state.affordable:
        return tuple(due), tuple(notes)
    chosen = due[len(due) - state.affordable :]
    notes.append(
        f"{len(due) - len(chosen)} checkpoints wait: scoring.hours_per_day is "
        f"{params.hours_per_day:g}, which allows {state.affordable} more now"
    )
    return tuple(chosen), tuple(notes)


def _every(
    present: Sequence[Healthy], state: State, every: int
) -> tuple[tuple[Healthy, ...], tuple[Healthy, ...]]:
    """Those without a score that are ``every`` or more after the last one with one; the others."""
    due, passed = [], []
    since = every
    for gone in _gone_before(present, state) if every > 1 else ():
        since = 1 if gone.signature in state.scored else since + 1
    for checkpoint in present:
        if checkpoint.signature in state.scored:
            since = 1
        elif since >= every:
            due.append(checkpoint)
            since = 1
        else:
            passed.append(checkpoint)
            since += 1
    return tuple(due), tuple(passed)


def _gone_before(
    present: Sequence[Healthy], state: State
) -> Sequence[CheckpointRecord | PassRecord]:
    """Those before the first that is present, as trained: a trainer keeps only its last few."""
    if not present:
        return ()
    first, there = present[0], {checkpoint.signature for checkpoint in present}
    known: dict[str, CheckpointRecord | PassRecord] = dict(state.passed)
    known |= {signature: state.checkpoints[signature] for signature in state.scored}
    gone = [
        record
        for signature, record in known.items()
        if signature not in there and record.stage == first.stage and record.step < first.step
    ]
    return sorted(gone, key=by_training)


def _to_quarantine(
    listing: Listing, state: State, boundaries: Sequence[int]
) -> tuple[Quarantine, ...]:
    """Damaged checkpoints, and those whose tensors are unlike the majority's.

    Each stage and each stretch between declared boundaries has a majority of its own, so that a
    change of shapes that is meant can be declared. Those count that the trainer has deleted, too.
    """
    found = [
        Quarantine(refused.checkpoint, None, refused.reason)
        for refused in listing.damaged
        if refused.checkpoint.signature not in state.quarantined
    ]
    cuts = sorted(boundaries)
    present = {checkpoint.signature: checkpoint for checkpoint in listing.complete}
    stretches: dict[tuple[str | None, int], list[Listed]] = {}
    for checkpoint in {**state.checkpoints, **present}.values():
        stretch = (checkpoint.stage, bisect.bisect_right(cuts, checkpoint.step))
        stretches.setdefault(stretch, []).append(checkpoint)
    for checkpoints in stretches.values():
        there = [c for c in checkpoints if c.signature in present]
        found += _unlike_the_majority(there, checkpoints, listing, state)
    return tuple(found)


def _unlike_the_majority(
    present: Sequence[Listed], known: Sequence[Listed], listing: Listing, state: State
) -> Iterator[Quarantine]:
    architectures = {c.signature: _architecture(c, listing, state) for c in known}
    counts = Counter(a for a in architectures.values() if a is not None).most_common(2)
    if len(counts) < 2 or counts[0][1] == counts[1][1]:
        return
    usual, count = counts[0]
    for checkpoint in present:
        architecture = architectures[checkpoint.signature]
        if architecture not in (usual, None) and checkpoint.signature not in state.quarantined:
            reason = (
                f"its tensors' names, shapes or dtypes are unlike those of {count} other "
                "checkpoints; another model in the same bucket? (If training did change here: "
                "window.boundaries, docs/operations.md)"
            )
            yield Quarantine(checkpoint, architecture, reason)


def _architecture(checkpoint: Listed, listing: Listing, state: State) -> str | None:
    signature = checkpoint.signature
    if signature in state.checkpoints:
        return state.checkpoints[signature].architecture
    if signature in state.quarantined:
        return state.quarantined[signature].architecture
    return listing.architectures.get(signature)
