"""Promote: decide on published fusions, once all that the decision rests on is there."""

from dataclasses import dataclass

from ckptfuse.promotion import champion, next_number, waiting
from ckptfuse.records import (
    PlanRecord,
    PromotionRecord,
    PublicationRecord,
    VetoOutcome,
    VetoRecord,
)
from ckptfuse.service import Service
from ckptfuse.steps.score import score_fusion
from ckptfuse.veto import from_arrays, outcome, veto_key


@dataclass(frozen=True, slots=True)
class _Decision:
    promoted: bool
    reason: str
    veto: VetoOutcome | None = None


#: Of a fusion whose damaged plan was removed: what it was decided from is not known.
_NO_PLAN = _Decision(False, "its plan is no longer among the records")


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
        plan = plans.get(published.fusion)
        if plan is None:
            settled.append(_record(service, published.fusion, published.step, _NO_PLAN))
            continue
        record = decide_promotion(service, plan)
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
        number=next_number(service),
        promoted=decision.promoted,
        reason=decision.reason,
        veto=decision.veto,
    )
    service.records.put(fusion, record)
    return record


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
    known = service.scorer.target(fusion, tokenizer, "audit")
    if known is not None:
        return known
    plans = service.records.all(PlanRecord).values()
    plan = next((p for p in plans if p.fusion == fusion), None)
    merged = service.weights_of(fusion)
    if plan is None or merged is None or plan.tokenizer != tokenizer:
        return None
    score_fusion(service, plan, merged)
    return service.scorer.target(fusion, tokenizer, "audit")
