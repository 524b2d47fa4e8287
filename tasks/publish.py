"""MLflow: register a fusion, decide on the champion, move the aliases last."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.digests import digest
from ckptfuse.errors import CkptfuseError
from ckptfuse.records import (
    CheckpointRecord,
    GateRecord,
    PlanRecord,
    PublicationRecord,
)
from ckptfuse.service import Service
from ckptfuse.steps.promote import decide_promotion
from tasks import curves, news
from tasks.aliases import follow_champion, tell
from tasks.ledger import LedgerEntry
from tasks.log import log
from tasks.marks import is_marked, mark
from tasks.registry import Registry, registry_of

#: The mark of curves that show what is recorded.
CURVES = "curves"


@task(cache_policy=NO_CACHE, task_run_name="register step {decided.step}")
def publish(
    service: Service,
    decided: PlanRecord,
    verdict: GateRecord,
    entry: LedgerEntry,
) -> PublicationRecord:
    """Version, alias ``candidate``, promotion, alias ``champion``, record: in this order.

    Raises PublicationError when MLflow cannot be reached or refuses; nothing is lost.
    """
    with registry_of(service) as registry:
        return _publish(registry, decided, verdict, entry)


def _publish(
    registry: Registry,
    decided: PlanRecord,
    verdict: GateRecord,
    entry: LedgerEntry,
) -> PublicationRecord:
    service = registry.service
    if registry.find_version(decided.fusion) is None:
        curves.describe_fusion(registry, registry.fusion_run(decided), decided, verdict)
    version = registry.register(decided, verdict, entry)
    known = service.records.all(PublicationRecord).values()
    tests = {gate.window: gate.test for gate in service.records.all(GateRecord).values()}
    if all(tests.get(record.window, 0) <= verdict.test for record in known):  # not one that waited
        registry.set_alias("candidate", version)
    promotion = decide_promotion(service, decided)
    follow_champion(service, registry)  # another one, if a person has promoted it meanwhile
    tell(service, decided.step, version, promotion)
    record = PublicationRecord(
        fusion=decided.fusion,
        window=decided.window,
        step=decided.step,
        tag=entry.tag,
        commit=entry.commit,
        weights_hash=entry.weights_hash,
        model_name=registry.name,
        version=version,
    )
    service.records.put(decided.window, record)
    news.published(service, record)
    return record


def what_curves_show(service: Service) -> str:
    """Digest of the records that the curves are drawn from."""
    kinds = (CheckpointRecord, PlanRecord, GateRecord)
    return digest([sorted(service.records.keys(kind)) for kind in kinds])


def curves_are_drawn(service: Service) -> bool:
    return is_marked(service, CURVES, what_curves_show(service))


@task(cache_policy=NO_CACHE)
def draw_curves(service: Service) -> None:
    """Bring MLflow's curves up to the records; a registry that is down waits for the next run."""
    seen = what_curves_show(service)
    try:
        with registry_of(service) as registry:
            curves.draw_curves(registry)
        mark(service, CURVES, seen)
    except CkptfuseError as error:
        log.warning("the curves in MLflow wait for the next run: %s", error)
