"""The numbers, by name (``ckptfuse_`` goes before each, ``_total`` after a counter).

Times are given as they are and not as ages: an age is ``time() - x`` in a query, and grows there
when nothing is written any more.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ckptfuse.gate import best_member, declined_streak
from ckptfuse.meter import Meter
from ckptfuse.metrics.seen import Seen
from ckptfuse.promotion import champion
from ckptfuse.records import (
    CheckpointRecord,
    FusionRecord,
    GateRecord,
    PlanRecord,
    PromotionRecord,
    PublicationRecord,
    SkipRecord,
)
from ckptfuse.stalls import usual_interval

Stepped = TypeVar("Stepped", CheckpointRecord, FusionRecord, PublicationRecord, PromotionRecord)


@dataclass(frozen=True, slots=True)
class Told:
    """One metric; ``values`` by those of ``label``, or under "" without one. None is not told."""

    name: str
    about: str
    values: Mapping[str, float | None]
    label: str | None = None
    is_counter: bool = False


def everything(seen: Seen) -> Iterator[Told]:
    yield from _looks(seen)
    yield from _progress(seen)
    yield from _outcomes(seen)
    yield from _costs(seen)


def _gauge(name: str, about: str, value: float | None) -> Told:
    return Told(name, about, {"": value})


# -- is anybody looking? -------------------------------------------------------------------------


def _looks(seen: Seen) -> Iterator[Told]:
    interval = seen.service.params.watch.interval_seconds
    yield _gauge("look_interval_seconds", "From one look at the bucket to the next.", interval)
    look = seen.look
    if look is None:
        return
    yield _gauge("look_begun_timestamp_seconds", "When a look last began.", look.begun)
    yield _gauge("look_ended_timestamp_seconds", "When one last came to its end.", look.ended)
    yield _gauge("looks_unfinished", "Looks begun since one came to its end.", look.unfinished)
    yield _gauge("publication_waits", "1 while one could not be finished.", look.waits is not None)
    yield _gauge("checkpoints_held", "That could not be read or scored just now.", len(look.held))
    yield _gauge("checkpoints_incomplete", "Still being written.", len(look.incomplete))
    yield _gauge("queue_length", "Checkpoints that wait for their score.", len(seen.queue))


# -- how far, and how good? ----------------------------------------------------------------------


def _progress(seen: Seen) -> Iterator[Told]:
    newest = {
        "seen": _newest_seen(seen),
        "scored": _newest(seen, seen.checkpoints),
        "fused": _newest(seen, seen.all(FusionRecord)),
        "published": _newest(seen, seen.all(PublicationRecord)),
        "champion": _newest(seen, _crowned(seen)),
    }
    steps = {stage: found[0] if found else None for stage, found in newest.items()}
    times = {stage: found[1] if found else None for stage, found in newest.items()}
    yield Told("step", "Newest training step that came so far.", steps, "stage")
    about = "When it did: as its trainer wrote it (seen), as the service recorded it (the others)."
    yield Told("step_timestamp_seconds", about, times, "stage")
    usual = usual_interval(record.modified for record in seen.checkpoints.values())
    yield _gauge("checkpoint_interval_seconds", "Median between the last checkpoints.", usual)
    yield Told("loss_nats", "Per token, on report text, of the newest.", _losses(seen), "model")


def _newest_seen(seen: Seen) -> tuple[int, float] | None:
    recorded = [(record.step, record.modified) for record in seen.checkpoints.values()]
    return max([*recorded, *seen.queue], key=lambda pair: pair[1], default=None)


def _newest(seen: Seen, records: Mapping[str, Stepped]) -> tuple[int, float] | None:
    """Step and time of the record that was written last."""
    written = [(r.step, seen.service.records.written(type(r), key)) for key, r in records.items()]
    return max(written, key=lambda pair: pair[1], default=None)


def _crowned(seen: Seen) -> dict[str, PromotionRecord]:
    promoted = {key: r for key, r in seen.all(PromotionRecord).items() if r.promoted}
    last = max(promoted, key=lambda key: promoted[key].number, default=None)
    return {last: promoted[last]} if last is not None else {}


def _losses(seen: Seen) -> dict[str, float | None]:
    losses: dict[str, float | None] = {}
    newest = max(seen.checkpoints.values(), key=lambda record: record.modified, default=None)
    if newest is not None:
        losses["raw"] = seen.loss(newest.fingerprint, newest.tokenizer)
    tests = {gate.window: gate.test for gate in seen.all(GateRecord).values()}
    plan = max(seen.plans.values(), key=lambda p: (p.step, tests.get(p.window, 0)), default=None)
    if plan is not None:
        losses["best_single"] = seen.loss(best_member(plan.members).fingerprint, plan.tokenizer)
        losses["fusion"] = seen.loss(plan.fusion, plan.tokenizer)
    present = champion(seen.service)
    if present is not None and present.fusion in seen.plans:
        tokenizer = seen.plans[present.fusion].tokenizer
        losses["champion"] = seen.loss(present.fusion, tokenizer)
    return losses


# -- what became of it? --------------------------------------------------------------------------


def _outcomes(seen: Seen) -> Iterator[Told]:
    checkpoints = {"scored": len(seen.checkpoints), "quarantined": len(seen.quarantined)}
    yield Told("checkpoints", "By what became of them.", checkpoints, "outcome", is_counter=True)
    verdicts = seen.all(GateRecord).values()
    windows = {
        "published": len(seen.all(PublicationRecord)),
        "declined": sum(1 for verdict in verdicts if verdict.verdict == "declined"),
        "skipped": len(seen.all(SkipRecord)),
    }
    yield Told("windows", "By what became of them.", windows, "outcome", is_counter=True)
    yield _gauge("declined_streak", "Declined since one last passed.", declined_streak(verdicts))


# -- what did it cost? ---------------------------------------------------------------------------


def _costs(seen: Seen) -> Iterator[Told]:
    workspace = seen.service.workspace
    hours = Meter(workspace.folder("cache") / "scoring.jsonl").total()
    about = "GPU seconds of all scoring jobs; seconds of the CPU where there is no GPU."
    yield Told("scoring_seconds", about, {"": hours * 3600}, is_counter=True)
    merged = seen.all(FusionRecord)
    about = "Fusions merged, those that their rule corrected afterwards among them."
    yield Told("merges", about, {"": len(merged)}, is_counter=True)
    moved = {
        "read": _bytes_read(seen, merged),
        "written": sum(record.size for record in merged.values()),
    }
    about = "Bytes of checkpoints that merges read, and of fusions that they wrote."
    yield Told("merge_bytes", about, moved, "direction", is_counter=True)
    newest = max(merged.values(), key=lambda record: record.step, default=None)
    yield _gauge("fusion_size_bytes", "Of the newest.", newest.size if newest else None)
    free = shutil.disk_usage(workspace.root).free
    yield _gauge("workspace_free_bytes", "Free on the workspace's disk.", free)


def _bytes_read(seen: Seen, merged: Mapping[str, FusionRecord]) -> int:
    sizes = {record.fingerprint: record.size for record in seen.checkpoints.values()}
    plans = {plan.fusion: plan for plan in seen.all(PlanRecord).values()}
    return sum(
        sizes.get(member.fingerprint, 0)
        for fusion in merged.keys() & plans.keys()
        for member in plans[fusion].members
        if member.weight
    )
