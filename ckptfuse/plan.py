"""plan(listing, state, params) -> actions: one pure function that decides what is to be done.

Watch, backfill and study use it alike. It decides from steps and records and not from timing, so
the same bucket and records always give the same actions, whoever asks and how often.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptfuse.checkpoints import Checkpoint
from ckptfuse.listing import Listing
from ckptfuse.params import Params
from ckptfuse.records import (
    CheckpointRecord,
    GateRecord,
    PlanRecord,
    PublicationRecord,
    QuarantineRecord,
    SkipRecord,
)
from ckptfuse.window import Window, window_key, windows


@dataclass(frozen=True)
class State:
    """What the records say. Checkpoints and quarantines by signature, the rest by window."""

    corpus: str
    checkpoints: Mapping[str, CheckpointRecord] = field(default_factory=dict)
    scored: frozenset[str] = frozenset()  # signatures whose every split has a score
    held: frozenset[str] = frozenset()  # signatures that could not be read just now
    quarantined: Mapping[str, QuarantineRecord] = field(default_factory=dict)
    plans: Mapping[str, PlanRecord] = field(default_factory=dict)
    gates: Mapping[str, GateRecord] = field(default_factory=dict)
    skips: Mapping[str, SkipRecord] = field(default_factory=dict)
    publications: Mapping[str, PublicationRecord] = field(default_factory=dict)

    def is_closed(self, window: str) -> bool:
        """Whether nothing is left to do for this window."""
        if window in self.skips or window in self.publications:
            return True
        return window in self.gates and self.gates[window].verdict == "declined"


@dataclass(frozen=True, slots=True)
class Quarantine:
    checkpoint: Checkpoint
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
    """What is to be done, in this order. ``publish`` are windows whose gate said so before."""

    quarantine: tuple[Quarantine, ...] = ()
    score: tuple[Checkpoint, ...] = ()
    publish: tuple[str, ...] = ()
    skip: tuple[Skip, ...] = ()
    fuse: tuple[Fuse, ...] = ()

    def __bool__(self) -> bool:
        return any((self.quarantine, self.score, self.publish, self.skip, self.fuse))


def plan(listing: Listing, state: State, params: Params, *, live: bool = True) -> Actions:
    """Decide. While checkpoints wait to be scored nothing is fused: ask again when they are.

    ``live``: of several waiting windows only the newest is fused, the others are superseded;
    otherwise (backfill) each is, in the order of training.
    """
    quarantine = _to_quarantine(listing, state)
    excluded = (
        {item.checkpoint.signature for item in quarantine} | state.quarantined.keys() | state.held
    )
    present = [c for c in listing.complete if c.signature not in excluded]
    score = tuple(c for c in present if c.signature not in state.scored)
    if quarantine or score:
        return Actions(quarantine=quarantine, score=score)
    healthy = [state.checkpoints[c.signature] for c in present]
    science = params.scientific_digest()
    waiting = []
    for window in windows(healthy, params.window):
        key = window_key(window.newest, science, state.corpus)
        if not state.is_closed(key):
            waiting.append(Fuse(key, window))
    publish = tuple(
        key
        for key, gate in state.gates.items()
        if gate.verdict == "publish" and not state.is_closed(key)
    )
    waiting = [item for item in waiting if item.key not in publish]
    if not live or not waiting:
        return Actions(publish=publish, fuse=tuple(waiting))
    newest = waiting[-1]
    superseded = tuple(
        Skip(item.key, item.window.step, f"superseded by step {newest.window.step}")
        for item in waiting[:-1]
    )
    return Actions(publish=publish, skip=superseded, fuse=(newest,))


def _to_quarantine(listing: Listing, state: State) -> tuple[Quarantine, ...]:
    """Damaged checkpoints, and those whose tensors are unlike the trajectory's majority."""
    found = [
        Quarantine(refused.checkpoint, None, refused.reason)
        for refused in listing.damaged
        if refused.checkpoint.signature not in state.quarantined
    ]
    architectures = {c.signature: _architecture(c, listing, state) for c in listing.complete}
    counts = Counter(a for a in architectures.values() if a is not None).most_common(2)
    if len(counts) < 2 or counts[0][1] == counts[1][1]:
        return tuple(found)
    usual = counts[0][0]
    for checkpoint in listing.complete:
        architecture = architectures[checkpoint.signature]
        if architecture not in (usual, None) and checkpoint.signature not in state.quarantined:
            reason = (
                "its tensors' names, shapes or dtypes are unlike those of the trajectory's "
                f"{counts[0][1]} other checkpoints; another model in the same bucket?"
            )
            found.append(Quarantine(checkpoint, architecture, reason))
    return tuple(found)


def _architecture(checkpoint: Checkpoint, listing: Listing, state: State) -> str | None:
    signature = checkpoint.signature
    if signature in state.checkpoints:
        return state.checkpoints[signature].architecture
    if signature in state.quarantined:
        return state.quarantined[signature].architecture
    return listing.architectures.get(signature)
