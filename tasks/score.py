"""Score checkpoints and fusions, each in a process of its own."""

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse import pipeline
from ckptfuse.checkpoints import Checkpoint
from ckptfuse.pipeline import Service
from ckptfuse.records import CheckpointRecord, FusionRecord, PlanRecord
from tasks.log import log


@task(cache_policy=NO_CACHE, task_run_name="score {names}")
def score_checkpoints(
    service: Service, waiting: Sequence[Checkpoint], names: str
) -> frozenset[str]:
    """Score what waits; the signatures of those that another run must try again."""
    unscored = pipeline.score_checkpoints(service, waiting)
    for item in unscored:
        verdict = "is quarantined" if item.quarantined else "could not be scored now"
        log.warning("%s %s: %s", item.checkpoint.name, verdict, item.reason)
    for checkpoint in waiting:
        record = service.records.get(CheckpointRecord, checkpoint.signature)
        if record is not None:
            losses = pipeline.losses_of(service, record.fingerprint, record.tokenizer, "selection")
            loss = pipeline.target_loss(service, losses)
            log.info("scored %s: loss %.4f on selection", checkpoint.name, loss)
    return frozenset(i.checkpoint.signature for i in unscored if not i.quarantined)


@task(cache_policy=NO_CACHE, task_run_name="score fusion of step {decided.step}")
def score_fusion(service: Service, decided: PlanRecord, fusion: FusionRecord) -> None:
    """Score the merged weights as any other model."""
    pipeline.score_fusion(service, decided, fusion)
