"""MLflow: register a fusion, decide on the champion, move the aliases last."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.digests import digest
from ckptfuse.errors import CkptfuseError, PublicationError
from ckptfuse.promotion import decide_promotion
from ckptfuse.records import (
    CheckpointRecord,
    FusionRecord,
    GateRecord,
    PlanRecord,
    PublicationRecord,
)
from ckptfuse.service import Service
from tasks.ledger import LedgerEntry
from tasks.log import log
from tasks.registry import Registry


@task(cache_policy=NO_CACHE, task_run_name="register step {decided.step}")
def publish(
    service: Service,
    decided: PlanRecord,
    verdict: GateRecord,
    fusion: FusionRecord,
    entry: LedgerEntry,
) -> PublicationRecord:
    """Version, alias ``candidate``, promotion, alias ``champion``, record: in this order.

    Raises PublicationError when MLflow cannot be reached or refuses; nothing is lost.
    """
    try:
        return _publish(service, decided, verdict, fusion, entry)
    except CkptfuseError:
        raise
    except Exception as error:
        raise PublicationError(f"MLflow: {type(error).__name__}: {error}") from error


def _publish(
    service: Service,
    decided: PlanRecord,
    verdict: GateRecord,
    fusion: FusionRecord,
    entry: LedgerEntry,
) -> PublicationRecord:
    registry = Registry(service)
    version = registry.register(decided, verdict, fusion, entry)
    registry.set_alias("candidate", version)
    promotion = decide_promotion(service, decided)
    if promotion.promoted:
        registry.set_alias("champion", version)
    kind = "champion" if promotion.promoted else "candidate"
    log.info("step %d is version %s, %s: %s", decided.step, version, kind, promotion.reason)
    record = PublicationRecord(
        fusion=decided.fusion,
        window=decided.window,
        step=decided.step,
        tag=entry.tag,
        commit=entry.commit,
        weights_hash=entry.weights_hash,
        model_name=registry.name,
        version=version,
        champion=promotion.promoted,
    )
    service.records.put(decided.window, record)
    return record


@task(cache_policy=NO_CACHE)
def draw_curves(service: Service) -> None:
    """Bring MLflow's curves up to the records; a registry that is down waits for the next run."""
    seen = digest(
        [sorted(service.records.all(k)) for k in (CheckpointRecord, PlanRecord, GateRecord)]
    )
    marker = service.workspace.folder("cache") / "curves"
    if marker.is_file() and marker.read_text() == seen:
        return  # without loading MLflow
    try:
        Registry(service).draw_curves()
        marker.write_text(seen)
    except Exception as error:  # any of MLflow's, its database's or the network's
        log.warning("the curves in MLflow wait for the next run: %s", error)
