"""Git and DVC: one commit and tag in the ledger per published fusion."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.records import FusionRecord, GateRecord, PlanRecord
from ckptfuse.service import Service
from tasks import held
from tasks.dvc_cache import DvcCache
from tasks.ledger import Ledger, LedgerEntry, tag_of
from tasks.log import log


def ledger_of(service: Service) -> Ledger:
    return Ledger(service.workspace.root / "ledger")


def bring_back(service: Service, decided: PlanRecord) -> None:
    """A merge that was deleted from the workspace, from the ledger's cache if that has it.

    What is made of it once more then needs none of its checkpoints.
    """
    merged = service.records.get(FusionRecord, decided.fusion)
    ledger, tag = ledger_of(service), tag_of(decided)
    if merged is None or service.weights_of(decided.fusion) is not None:
        return
    if ledger.is_there and ledger.find(tag) is not None:
        place = service.workspace.model(decided.fusion)
        DvcCache(ledger).restore(tag, merged.files, place)


@task(cache_policy=NO_CACHE, task_run_name="commit step {decided.step}")
def commit_fusion(service: Service, decided: PlanRecord, verdict: GateRecord) -> LedgerEntry:
    """Pin the fusion's data and weights, and hold its checkpoints where they are to be held."""
    if service.params.versions.inputs == "held":
        held.hold(service, decided, tag_of(decided))
    entry = ledger_of(service).enter(service, decided, verdict)
    log.info("step %d is in the ledger under the tag %s", decided.step, entry.tag)
    return entry
