"""Champion or not: a second decision, apart from publication, so that consumers are not churned."""

from pathlib import Path

from ckptfuse.errors import ConfigurationError
from ckptfuse.records import FusionRecord, PlanRecord, PromotionRecord, PublicationRecord
from ckptfuse.service import Service, losses_of, target_loss
from ckptfuse.steps.score import score_fusion


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


def decide_promotion(service: Service, decided: PlanRecord) -> PromotionRecord:
    """Promote unless the present champion is as good on audit text; the first is promoted."""
    known = service.records.get(PromotionRecord, decided.fusion)
    if known is not None:
        return known
    promoted, reason = _judge(service, decided)
    record = PromotionRecord(
        fusion=decided.fusion,
        step=decided.step,
        number=_next_number(service),
        promoted=promoted,
        reason=reason,
    )
    service.records.put(decided.fusion, record)
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
    return len(service.records.all(PromotionRecord)) + 1


def _judge(service: Service, decided: PlanRecord) -> tuple[bool, str]:
    present = champion(service)
    if present is None:
        return True, "the first published fusion"
    name = f"the champion of step {present.step}"
    if present.by is not None:
        name += f" (by hand: {present.by})"
    present_loss = _audit_loss(service, present.fusion, decided.tokenizer)
    if present_loss is None and present.by is not None:
        return False, f"{name} can no longer be scored on the present audit text; it stays"
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
