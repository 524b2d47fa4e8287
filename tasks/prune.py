"""Delete merged weights that nobody needs from the workspace; the ledger keeps published ones."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.promotion import champion, waiting
from ckptfuse.records import (
    FusionRecord,
    GateRecord,
    PlanRecord,
    PruneRecord,
    PublicationRecord,
)
from ckptfuse.service import Service, plans_of
from ckptfuse.store import remove_folder
from tasks.log import log


@task(cache_policy=NO_CACHE)
def prune(service: Service) -> None:
    """Delete declined fusions, those whose weights were corrected, and published ones but two.

    The champion, the newest and those that wait for their veto stay.
    """
    records = service.records
    published = {p.fusion: p for p in records.all(PublicationRecord).values()}
    declined = {g.fusion: g for g in records.all(GateRecord).values() if g.verdict == "declined"}
    present = champion(service)
    keep = {record.fusion for record in waiting(service)} | ({present.fusion} if present else set())
    if published:
        keep.add(max(published.values(), key=lambda p: int(p.version)).fusion)
    corrected = _corrected(service)
    for fusion, record in records.all(FusionRecord).items():
        folder = Path(record.folder)
        if fusion in keep or not folder.is_dir():
            continue
        if fusion in published:
            _delete(service, fusion, folder, "published; the ledger and the registry hold it")
        elif fusion in declined:
            _delete(service, fusion, folder, f"declined: {declined[fusion].reason}")
        elif fusion in corrected:
            _delete(service, fusion, folder, "its rule corrected the weights once it was scored")


def _corrected(service: Service) -> set[str]:
    """Fusions of judged windows that are not what was judged."""
    judged = {verdict.window for verdict in service.records.all(GateRecord).values()}
    plans = service.records.all(PlanRecord).values()
    current = {plan.fusion for plan in plans_of(service).values()}
    return {plan.fusion for plan in plans if plan.window in judged} - current


def _delete(service: Service, fusion: str, folder: Path, reason: str) -> None:
    service.records.put(fusion, PruneRecord(fusion=fusion, folder=str(folder), reason=reason))
    remove_folder(folder)
    log.info("deleted the merged weights %s: %s", fusion[:12], reason)
