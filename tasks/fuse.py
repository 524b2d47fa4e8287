"""Weights, merge and verdict of one window."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.notes import explain
from ckptfuse.plan import Fuse
from ckptfuse.records import FusionRecord, GateRecord, PlanRecord
from ckptfuse.service import Service
from ckptfuse.steps import judge, merge, weigh
from tasks import news
from tasks.log import log


@task(cache_policy=NO_CACHE, task_run_name="weigh step {item.window.step}")
def decide_weights(service: Service, item: Fuse) -> PlanRecord:
    """Ask the rule for the window's weights."""
    decided = weigh.decide_weights(service, item)
    _tell(decided)
    return decided


@task(cache_policy=NO_CACHE, task_run_name="review step {item.window.step}")
def review_weights(service: Service, item: Fuse, decided: PlanRecord) -> PlanRecord:
    """Ask the rule again, now that its fusion is scored."""
    reviewed = weigh.review_weights(service, item, decided)
    if reviewed.revision != decided.revision:
        _tell(reviewed)
    return reviewed


def _tell(decided: PlanRecord) -> None:
    shares = ", ".join(f"{m.step}: {m.weight:.3f}" for m in decided.members if m.weight)
    log.info("weights at step %d by %s: %s", decided.step, decided.rule, shares)
    for sentence in explain(decided):
        log.info("step %d: %s", decided.step, sentence)


@task(cache_policy=NO_CACHE, task_run_name="merge step {decided.step}, shard {shard}")
def merge_shard(service: Service, decided: PlanRecord, shard: int) -> None:
    """Merge one of the window's shards."""
    merge.merge_shard(service, decided, shard)


@task(cache_policy=NO_CACHE, task_run_name="merge step {decided.step}")
def merge_fusion(service: Service, decided: PlanRecord) -> FusionRecord:
    """Merge the window into the workspace, or what its shards have left of it."""
    return merge.merge_fusion(service, decided)


@task(cache_policy=NO_CACHE, task_run_name="judge step {decided.step}")
def judge_fusion(service: Service, decided: PlanRecord) -> GateRecord:
    """Compare on audit text."""
    verdict = judge.judge_fusion(service, decided)
    log.info("step %d: %s: %s", decided.step, verdict.verdict, verdict.reason)
    news.judged(service, verdict)
    return verdict
