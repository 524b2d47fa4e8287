"""Git and DVC: one commit and tag in the ledger per published fusion."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.records import GateRecord, PlanRecord
from ckptfuse.service import Service
from tasks import held
from tasks.ledger import Ledger, LedgerEntry, tag_of
from tasks.log import log


def ledger_of(service: Service) -> Ledger:
    return Ledger(service.workspace.root / "ledger")


@task(cache_policy=NO_CACHE, task_run_name="commit step {decided.step}")
def commit_fusion(service: Service, decided: PlanRecord, verdict: GateRecord) -> LedgerEntry:
    """Pin the fusion's data and weights, and hold its checkpoints where they are to be held."""
    if service.params.versions.inputs == "held":
        held.hold(service, decided, tag_of(decided))
    entry = ledger_of(service).enter(service, decided, verdict)
    log.info("step %d is in the ledger under the tag %s", decided.step, entry.tag)
    return entry
