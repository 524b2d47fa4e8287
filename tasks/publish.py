"""MLflow: register a fusion, decide on the champion, move the aliases last."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.digests import digest
from ckptfuse.errors import CkptfuseError, PublicationError
from ckptfuse.promotion import champion, decide_promotion, settle
from ckptfuse.records import (
    CheckpointRecord,
    FusionRecord,
    GateRecord,
    PlanRecord,
    PromotionRecord,
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
    if promotion is not None and promotion.promoted:
        registry.set_alias("champion", version)
        _alias_marker(service).write_text(decided.fusion)
    _tell(decided.step, version, promotion)
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
    return record


def _tell(step: int, version: str, promotion: PromotionRecord | None) -> None:
    if promotion is None:
        log.info("step %d is version %s, candidate: `ckptfuse veto` is next", step, version)
        return
    kind = "champion" if promotion.promoted else "candidate"
    log.info("step %d is version %s, %s: %s", step, version, kind, promotion.reason)


def _alias_marker(service: Service) -> Path:
    """Holds the fusion that the alias ``champion`` was last moved to."""
    return service.workspace.folder("cache") / "champion"


@task(cache_policy=NO_CACHE)
def promote_waiting(service: Service) -> None:
    """Decide on candidates whose veto was heard since, and bring the alias up to the records."""
    versions = {p.fusion: p.version for p in service.records.all(PublicationRecord).values()}
    for promotion in settle(service):
        _tell(promotion.step, versions[promotion.fusion], promotion)
    present, marker = champion(service), _alias_marker(service)
    if present is None or present.fusion not in versions:
        return  # its publication moves the alias
    if marker.is_file() and marker.read_text() == present.fusion:
        return  # without loading MLflow
    try:
        Registry(service).set_alias("champion", versions[present.fusion])
        marker.write_text(present.fusion)
    except Exception as error:  # any of MLflow's, its database's or the network's
        log.warning("the alias champion in MLflow waits for the next run: %s", error)


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
