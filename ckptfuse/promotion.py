"""The champion by the records, and by hand: `steps/promote.py` decides for the service.

Champion or not is a second decision, apart from publication, so that consumers are not churned.
"""

from ckptfuse.errors import ConfigurationError
from ckptfuse.published import in_order_of_publication
from ckptfuse.records import PromotionRecord, PublicationRecord
from ckptfuse.service import Service


def champion(service: Service) -> PromotionRecord | None:
    """The fusion that was promoted last; None before the first."""
    promoted = _promotions(service)
    return promoted[-1] if promoted else None


def standing(service: Service) -> list[PromotionRecord]:
    """The promotions that no rollback took back, oldest first; the last made the champion."""
    promoted = _promotions(service)
    undone = {record.undoes for record in promoted}
    return [r for r in promoted if r.undoes is None and r.number not in undone]


def _promotions(service: Service) -> list[PromotionRecord]:
    promoted = [p for p in service.records.all(PromotionRecord).values() if p.promoted]
    return sorted(promoted, key=lambda record: record.number)


def waiting(service: Service) -> list[PublicationRecord]:
    """Published fusions on which nothing is decided yet, in the order of publication."""
    decided = {record.fusion for record in service.records.all(PromotionRecord).values()}
    published = service.records.all(PublicationRecord).values()
    left = [record for record in published if record.fusion not in decided]
    return in_order_of_publication(service, left)


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
    number = next_number(service)
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


def next_number(service: Service) -> int:
    """Of the next decision; a damaged record that was removed leaves a gap."""
    return max((p.number for p in service.records.all(PromotionRecord).values()), default=0) + 1
