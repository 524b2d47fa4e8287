"""Champion or not: a second decision, apart from publication, so that consumers are not churned."""

from pathlib import Path

from ckptfuse.records import FusionRecord, PlanRecord, PromotionRecord
from ckptfuse.service import Service, losses_of, target_loss
from ckptfuse.steps.score import score_fusion


def champion(service: Service) -> PromotionRecord | None:
    """The fusion that was promoted last; None before the first."""
    promoted = [p for p in service.records.all(PromotionRecord).values() if p.promoted]
    return max(promoted, key=lambda record: record.number, default=None)


def decide_promotion(service: Service, decided: PlanRecord) -> PromotionRecord:
    """Promote unless the present champion is as good on audit text; the first is promoted."""
    known = service.records.get(PromotionRecord, decided.fusion)
    if known is not None:
        return known
    promoted, reason = _judge(service, decided)
    record = PromotionRecord(
        fusion=decided.fusion,
        step=decided.step,
        number=len(service.records.all(PromotionRecord)) + 1,
        promoted=promoted,
        reason=reason,
    )
    service.records.put(decided.fusion, record)
    return record


def _judge(service: Service, decided: PlanRecord) -> tuple[bool, str]:
    present = champion(service)
    if present is None:
        return True, "the first published fusion"
    name = f"the champion of step {present.step}"
    present_loss = _audit_loss(service, present.fusion, decided.tokenizer)
    if present_loss is None:
        return True, f"{name} can no longer be scored on the present audit text"
    own = losses_of(service, decided.fusion, decided.tokenizer, "audit")
    gain = present_loss - target_loss(service, own)
    needed = service.params.promotion.minimum_gain
    if gain > needed:
        return True, f"{gain:+.4f} nats better on audit than {name}"
    return (False, f"{gain:+.4f} nats on audit against {name}, more than {needed:g} needed")


def _audit_loss(service: Service, fusion: str, tokenizer: str) -> float | None:
    """The champion's loss, scored now if the audit text changed since it was published."""
    losses = service.scorer.losses(fusion, tokenizer, "audit")
    if losses is None:
        plans = service.records.all(PlanRecord).values()
        plan = next((p for p in plans if p.fusion == fusion), None)
        merged = service.records.get(FusionRecord, fusion)
        if plan is None or merged is None or plan.tokenizer != tokenizer:
            return None
        if not Path(merged.folder).is_dir():
            return None
        score_fusion(service, plan, merged)
        losses = losses_of(service, fusion, tokenizer, "audit")
    return target_loss(service, losses)
