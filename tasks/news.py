"""News of a look: what a person wants to hear of, as events for Prefect's automations."""

import time
from datetime import timedelta
from pathlib import Path

from ckptfuse.gate import declined_streak
from ckptfuse.listing import Healthy, Listed, Listing
from ckptfuse.records import CheckpointRecord, GateRecord, PublicationRecord, QuarantineRecord
from ckptfuse.service import Service
from ckptfuse.stalls import silence
from ckptfuse.steps.look import look_file
from ckptfuse.steps.spikes import spikes_among
from tasks.events import tell
from tasks.log import log

#: A streak is told of when it reaches this length, and each time it has grown by as much.
STREAK = 5


def published(service: Service, record: PublicationRecord) -> None:
    text = f"step {record.step} is version {record.version} of {record.model_name} ({record.tag})"
    tell(service, "fusion.published", record.step, text)


def judged(service: Service, verdict: GateRecord) -> None:
    """Of a declined fusion, and of every fifth in a row."""
    if verdict.verdict != "declined":
        return
    tell(service, "fusion.declined", verdict.step, f"step {verdict.step}: {verdict.reason}")
    streak = declined_streak(service.records.all(GateRecord).values())
    if streak and streak % STREAK == 0:
        text = f"the last {streak} fusions were declined; step {verdict.step}: {verdict.reason}"
        log.warning(text)
        tell(service, "fusion.declined-streak", verdict.step, text)


def quarantined(service: Service, checkpoint: Listed, reason: str) -> None:
    text = f"{checkpoint.name} is quarantined: {reason}"
    log.warning(text)
    tell(service, "checkpoint.quarantined", checkpoint.step, text)


def scored(service: Service, records: list[CheckpointRecord]) -> None:
    """Of those that left the trend of the trajectory's losses."""
    found = spikes_among(service, records)
    for record in records:
        if (excess := found.get(record.fingerprint)) is not None:
            text = f"{record.name} is a spike: {excess:.4f} nats above the trend"
            log.warning(text)
            tell(service, "checkpoint.spiked", record.step, text)


def incomplete(service: Service, listing: Listing) -> None:
    """Of each checkpoint that is not complete yet once: a look a minute would fill the log.

    It is compared with what the last look left, so before this one leaves what it has found.
    """
    last = look_file(service).last()
    told = {item.name for item in last.incomplete} if last else set()
    for refused in listing.incomplete:
        if refused.checkpoint.name not in told:
            log.info("%s is not complete yet: %s", refused.checkpoint.name, refused.reason)


def stalled(service: Service, listing: Listing) -> None:
    """Of a trainer that has fallen silent, once for each newest checkpoint."""
    found = untold_stall(service, listing)
    if found is None:
        return
    newest, text = found
    log.warning(text)
    tell(service, "trajectory.stalled", newest.step, text)
    _stalled_file(service).write_text(newest.signature)


def untold_stall(service: Service, listing: Listing) -> tuple[Healthy, str] | None:
    """The newest checkpoint, where none has come for long and nobody was told, and the sentence."""
    seen = {c.signature: c for c in listing.complete if not isinstance(c, QuarantineRecord)}
    known: dict[str, Healthy] = {**service.records.all(CheckpointRecord), **seen}
    found = silence([one.modified for one in known.values()], time.time())
    if found is None:
        return None
    newest = max(known.values(), key=lambda one: one.modified)
    told = _stalled_file(service)
    if told.is_file() and told.read_text() == newest.signature:
        return None
    quiet, usual = (timedelta(seconds=round(seconds)) for seconds in found)
    return newest, f"no checkpoint for {quiet}, where {usual} is usual; the newest is {newest.name}"


def _stalled_file(service: Service) -> Path:
    return service.workspace.folder("cache") / "stalled"
