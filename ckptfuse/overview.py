"""A trajectory at a glance, from the records alone: the rows of ``status``, report and demo."""

from collections.abc import Iterable
from dataclasses import dataclass

from ckptfuse.corpus import Split
from ckptfuse.gate import best_member
from ckptfuse.losses import Losses
from ckptfuse.pipeline import Service
from ckptfuse.promotion import champion
from ckptfuse.records import (
    CheckpointRecord,
    GateRecord,
    PlanRecord,
    PromotionRecord,
    PublicationRecord,
    QuarantineRecord,
    SkipRecord,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One checkpoint and the window that ends at it. Losses are of one split, in nats."""

    name: str
    step: int
    loss: float | None
    best_single: float | None = None
    fused: float | None = None
    gain: float | None = None  # over the best single checkpoint
    verdict: str = ""
    reason: str = ""
    plan: PlanRecord | None = None


@dataclass(frozen=True)
class Overview:
    rows: tuple[Row, ...]
    quarantined: tuple[QuarantineRecord, ...]
    champion: PromotionRecord | None
    publications: tuple[PublicationRecord, ...]


def overview(service: Service, split: Split = "report") -> Overview:
    """Read the records; ``split`` is where the losses are quoted from."""
    records = service.records
    plans = {plan.ancillary: plan for plan in records.all(PlanRecord).values()}
    gates = {gate.window: gate for gate in records.all(GateRecord).values()}
    skips = {skip.step: skip for skip in records.all(SkipRecord).values()}
    publications = {p.window: p for p in records.all(PublicationRecord).values()}
    rows = []
    for checkpoint in _in_order(records.all(CheckpointRecord).values()):
        loss = _loss(service, checkpoint.fingerprint, checkpoint.tokenizer, split)
        row = Row(checkpoint.name, checkpoint.step, loss)
        plan = plans.get(checkpoint.fingerprint)
        if plan is not None:
            row = _with_plan(service, row, plan, gates.get(plan.window), publications, split)
        elif checkpoint.step in skips:
            skipped = skips[checkpoint.step]
            row = Row(
                checkpoint.name, checkpoint.step, loss, verdict="skipped", reason=skipped.reason
            )
        rows.append(row)
    return Overview(
        rows=tuple(rows),
        quarantined=tuple(records.all(QuarantineRecord).values()),
        champion=champion(service),
        publications=tuple(sorted(publications.values(), key=lambda p: int(p.version))),
    )


def _with_plan(
    service: Service,
    row: Row,
    plan: PlanRecord,
    verdict: GateRecord | None,
    publications: dict[str, PublicationRecord],
    split: Split,
) -> Row:
    best = _losses(service, best_member(plan.members).fingerprint, plan.tokenizer, split)
    fused = _losses(service, plan.fusion, plan.tokenizer, split)
    weights = service.scorer.target_weights
    best_loss = best.target(weights).mean if best else None
    fused_loss = fused.target(weights).mean if fused else None
    published = publications.get(plan.window)
    word = "deciding"
    if verdict is not None:
        word = verdict.verdict if verdict.verdict == "declined" else "publishing"
    if published is not None:
        word = "champion" if published.champion else "published"
    return Row(
        row.name,
        row.step,
        row.loss,
        best_single=best_loss,
        fused=fused_loss,
        gain=best_loss - fused_loss if best_loss is not None and fused_loss is not None else None,
        verdict=word,
        reason=verdict.reason if verdict else "",
        plan=plan,
    )


def _in_order(checkpoints: Iterable[CheckpointRecord]) -> list[CheckpointRecord]:
    """By training, each content once (a copied or touched checkpoint has several records)."""
    unique = {(c.fingerprint, c.step): c for c in checkpoints}
    return sorted(unique.values(), key=lambda c: (c.generation, c.step))


def _losses(service: Service, model_id: str, tokenizer: str, split: Split) -> Losses | None:
    return service.scorer.losses(model_id, tokenizer, split)


def _loss(service: Service, model_id: str, tokenizer: str, split: Split) -> float | None:
    losses = _losses(service, model_id, tokenizer, split)
    return losses.target(service.scorer.target_weights).mean if losses else None


def steps_saved(rows: Iterable[Row], fused: Row) -> int | None:
    """Further steps until the raw trajectory first reaches a fusion's loss; None if it has not.

    Linear between the two checkpoints around the crossing.
    """
    if fused.fused is None:
        return None
    before: Row | None = None
    for row in rows:
        if row.loss is None or row.step < fused.step:
            continue
        if row.loss <= fused.fused:
            if before is None or before.loss is None:
                return row.step - fused.step
            share = (before.loss - fused.fused) / (before.loss - row.loss)
            return round(before.step + share * (row.step - before.step)) - fused.step
        before = row
    return None
