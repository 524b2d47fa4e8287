"""Champion or not: a second decision, apart from publication, so that consumers are not churned."""

from dataclasses import dataclass

from ckptfuse.errors import ConfigurationError
from ckptfuse.published import in_order_of_publication
from ckptfuse.records import (
    PlanRecord,
    PromotionRecord,
    PublicationRecord,
    VetoOutcome,
    VetoRecord,
)
from ckptfuse.service import Service, losses_of, target_loss
from ckptfuse.steps.score import score_fusion
from ckptfuse.veto import from_arrays, outcome, veto_key


@dataclass(frozen=True, slots=True)
class _Decision:
    promoted: bool
    reason: str
    veto: VetoOutcome | None = None


def champion(service: Service) -> PromotionRecord | None:
    """The fusion that was promoted last; None before the first."""
    promoted = _promotions(service)
    return promoted[-1] if promoted else None


def standing(service: Service) -> list[PromotionRecord]:
    """The promotions that no rollback took back, oldest first; the last made the champion."""
    left: list[PromotionRecord] = []
    for record in _promotions(service):
        if record.undoes is None:
            left.append(record)
        else:
            left.pop()
    return left


def _promotions(service: Service) -> list[PromotionRecord]:
    promoted = [p for p in service.records.all(PromotionRecord).values() if p.promoted]
    return sorted(promoted, key=lambda record: record.number)


def waiting(service: Service) -> list[PublicationRecord]:
    """Published fusions on which nothing is decided yet, in the order of publication."""
    decided = {record.fusion for record in service.records.all(PromotionRecord).values()}
    published = service.records.all(PublicationRecord).values()
    left = [record for record in published if record.fusion not in decided]
    return in_order_of_publication(service, left)


def decide_promotion(service: Service, decided: PlanRecord) -> PromotionRecord | None:
    """Promote unless the present champion is as good on audit text, too near, or the veto is used.

    None as long as that rests on answers which ``ckptfuse veto`` has not brought yet. The first
    published fusion has no champion to be compared with.
    """
    known = service.records.get(PromotionRecord, decided.fusion)
    if known is not None:
        return known
    decision = _decide(service, decided)
    return None if decision is None else _record(service, decided.fusion, decided.step, decision)


def settle(service: Service) -> list[PromotionRecord]:
    """Decide on the waiting fusions whose answers have come, and close those published before them.

    A newer one that is still waiting stays: where publications come faster than answers, each
    answer counts all the same.
    """
    left = waiting(service)
    if not left:
        return []  # without reading every plan
    plans = {plan.fusion: plan for plan in service.records.all(PlanRecord).values()}
    settled: list[PromotionRecord] = []
    older: list[PublicationRecord] = []
    for published in left:
        record = decide_promotion(service, plans[published.fusion])
        if record is None:
            older.append(published)
            continue
        settled.append(record)
        if record.veto is not None:
            reason = f"step {record.step} was heard in its place"
            for other in older:
                settled.append(_record(service, other.fusion, other.step, _Decision(False, reason)))
            older.clear()
    return settled


def _record(service: Service, fusion: str, step: int, decision: _Decision) -> PromotionRecord:
    record = PromotionRecord(
        fusion=fusion,
        step=step,
        number=_next_number(service),
        promoted=decision.promoted,
        reason=decision.reason,
        veto=decision.veto,
    )
    service.records.put(fusion, record)
    return record


def promote_by_hand(
    service: Service, chosen: PublicationRecord, *, by: str, reason: str
) -> PromotionRecord:
    """Make a published fusion the champion; the present record when it is that already.

    Fusions to come are compared with it, as with any champion.
    """
    present = champion(service)
    if present is not None and present.fusion == chosen.fusion:
        return present
    return _put_by_hand(service, chosen, by=by, reason=reason, undoes=None)


def rollback_by_hand(
    service: Service, target: PublicationRecord, *, by: str, reason: str
) -> PromotionRecord:
    """Take the last promotion back; ``target`` is what ``rollback_target`` answered."""
    return _put_by_hand(service, target, by=by, reason=reason, undoes=standing(service)[-1].number)


def rollback_target(service: Service) -> str:
    """The fusion that was champion before; raises ConfigurationError when there was none."""
    left = standing(service)
    if len(left) < 2:
        raise ConfigurationError("there was no other champion before; nothing to roll back to")
    return left[-2].fusion


def _put_by_hand(
    service: Service, chosen: PublicationRecord, *, by: str, reason: str, undoes: int | None
) -> PromotionRecord:
    number = _next_number(service)
    record = PromotionRecord(
        fusion=chosen.fusion,
        step=chosen.step,
        number=number,
        promoted=True,
        reason=reason,
        by=by,
        undoes=undoes,
    )
    service.records.put(f"by-hand-{number}", record)
    return record


def _next_number(service: Service) -> int:
    return max((p.number for p in service.records.all(PromotionRecord).values()), default=0) + 1


def _decide(service: Service, decided: PlanRecord) -> _Decision | None:
    present = champion(service)
    if present is None:
        return _Decision(True, "the first published fusion")
    name = f"the champion of step {present.step}"
    if present.by is not None:
        name += f" (by hand: {present.by})"
    spacing = service.params.promotion.spacing
    apart = abs(decided.step - present.step)  # a rollback may bring a lower step
    if apart < spacing:
        return _Decision(False, f"{apart} steps from {name}, at least {spacing} needed")
    present_loss = _audit_loss(service, present.fusion, decided.tokenizer)
    if present_loss is None and present.by is not None:
        reason = f"{name} can no longer be scored on the present audit text; it stays"
        return _Decision(False, reason)
    if present_loss is None:
        better = f"{name} can no longer be scored on the present audit text"
    else:
        own = _audit_loss(service, decided.fusion, decided.tokenizer)
        if own is None:
            return _Decision(False, "it can no longer be scored on the present audit text")
        gain = present_loss - own
        needed = service.params.promotion.minimum_gain
        if gain <= needed:
            reason = f"{gain:+.4f} nats on audit against {name}, more than {needed:g} needed"
            return _Decision(False, reason)
        better = f"{gain:+.4f} nats better on audit than {name}"
    if not service.params.promotion.veto.command:
        return _Decision(True, better)
    return _hear(service, decided.fusion, present, better)


def _hear(service: Service, fusion: str, present: PromotionRecord, better: str) -> _Decision | None:
    """The veto's word on a fusion that nothing else speaks against."""
    params = service.params.promotion.veto
    keys = [veto_key(model, params.command) for model in (fusion, present.fusion)]
    if not all(service.records.has(VetoRecord, key) for key in keys):
        return None
    own, other = (from_arrays(service.records.arrays(VetoRecord, key)) for key in keys)
    found = outcome(own, other, against=present.fusion)
    answers = (
        f"{found.won} items won and {found.lost} lost of {found.items} (p {found.p_value:.2g})"
    )
    if found.items == 0:
        reason = f"veto: it and the champion of step {present.step} were asked no item in common"
        return _Decision(False, reason, found)
    if found.p_value <= params.alpha:
        reason = f"veto: worse answers than the champion of step {present.step}, {answers}"
        return _Decision(False, f"{reason}, though {better}", found)
    return _Decision(True, f"{better}; no veto, {answers}", found)


def _audit_loss(service: Service, fusion: str, tokenizer: str) -> float | None:
    """A fusion's loss, scored now if the audit text changed since it was published."""
    losses = service.scorer.losses(fusion, tokenizer, "audit")
    if losses is None:
        plans = service.records.all(PlanRecord).values()
        plan = next((p for p in plans if p.fusion == fusion), None)
        merged = service.weights_of(fusion)
        if plan is None or merged is None or plan.tokenizer != tokenizer:
            return None
        score_fusion(service, plan, merged)
        losses = losses_of(service, fusion, tokenizer, "audit")
    return target_loss(service, losses)
