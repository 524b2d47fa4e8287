"""Score checkpoints and fusions, each in a process of its own."""

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency

from ckptfuse.jobs import Here, ModelScores
from ckptfuse.listing import Healthy
from ckptfuse.protocol import Request
from ckptfuse.records import PlanRecord
from ckptfuse.service import Service, losses_of, target_loss
from ckptfuse.steps import score
from ckptfuse.steps.score import Unscored
from tasks import news
from tasks.deployments import GPUS
from tasks.log import log


@task(cache_policy=NO_CACHE, task_run_name="score {names}")
def score_checkpoints(service: Service, waiting: Sequence[Healthy], names: str) -> list[Unscored]:
    """Score what waits; returns those that have no score, for good or for now."""
    unscored = score.score_checkpoints(service, waiting)
    for item in unscored:
        if item.quarantined:
            news.quarantined(service, item.checkpoint, item.reason)
        else:
            log.warning("%s could not be scored now: %s", item.checkpoint.name, item.reason)
    left = {item.checkpoint.signature for item in unscored}
    known = service.checkpoints()
    scored = [known[one.signature] for one in waiting if one.signature not in left]
    for record in scored:
        losses = losses_of(service, record.fingerprint, record.tokenizer, "selection")
        log.info("scored %s: loss %.4f on selection", record.name, target_loss(service, losses))
    news.scored(service, scored)
    return unscored


@task(cache_policy=NO_CACHE, task_run_name="score fusion of step {decided.step}")
def score_fusion(service: Service, decided: PlanRecord) -> None:
    """Score the merged weights as any other model."""
    score.score_fusion(service, decided, service.workspace.model(decided.fusion))


@task(cache_policy=NO_CACHE, task_run_name="score {names}")
def score_for_others(request: Request, gpus_per_job: int, names: str) -> list[ModelScores]:
    """One job, on GPUs that the server counts and this machine locks.

    ``strict``: without the limit nothing would be counted. A lease that cannot be renewed, since
    the server is down, must not end hours of work: the machine's own lock holds all the same.
    """
    with concurrency(GPUS, occupy=gpus_per_job, strict=True, raise_on_lease_renewal_failure=False):
        log.info("scoring %s", names)
        return Here(most=1).run(request, gpus_per_job)
