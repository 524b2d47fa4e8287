"""Score checkpoints and fusions, each in a process of its own."""

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.checkpoints import Checkpoint
from ckptfuse.records import CheckpointRecord, FusionRecord, PlanRecord
from ckptfuse.service import Service, losses_of, target_loss
from ckptfuse.steps import score
from ckptfuse.steps.score import Unscored
from tasks.log import log


@task(cache_policy=NO_CACHE, task_run_name="score {names}")
def score_checkpoints(
    service: Service, waiting: Sequence[Checkpoint], names: str
) -> list[Unscored]:
    """Score what waits; returns those that have no score, for good or for now."""
    unscored = score.score_checkpoints(service, waiting)
    for item in unscored:
        verdict = "is quarantined" if item.quarantined else "could not be scored now"
        log.warning("%s %s: %s", item.checkpoint.name, verdict, item.reason)
    for checkpoint in waiting:
        record = service.records.get(CheckpointRecord, checkpoint.signature)
        if record is not None:
            losses = losses_of(service, record.fingerprint, record.tokenizer, "selection")
            loss = target_loss(service, losses)
            log.info("scored %s: loss %.4f on selection", checkpoint.name, loss)
    return unscored


@task(cache_policy=NO_CACHE, task_run_name="score fusion of step {decided.step}")
def score_fusion(service: Service, decided: PlanRecord, fusion: FusionRecord) -> None:
    """Score the merged weights as any other model."""
    score.score_fusion(service, decided, fusion)
