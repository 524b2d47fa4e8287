"""Weights, merge and verdict of one window."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.plan import Fuse
from ckptfuse.records import FusionRecord, GateRecord, PlanRecord
from ckptfuse.service import Service
from ckptfuse.steps import judge, merge, weigh
from tasks.log import log


@task(cache_policy=NO_CACHE, task_run_name="weigh step {item.window.step}")
def decide_weights(service: Service, item: Fuse) -> PlanRecord:
    """Ask the rule for the window's weights."""
    decided = weigh.decide_weights(service, item)
    shares = ", ".join(f"{m.step}: {m.weight:.3f}" for m in decided.members if m.weight)
    notes = ", ".join(f"{name} {value:.4f}" for name, value in decided.notes.items())
    log.info("weights at step %d by %s: %s (%s)", decided.step, decided.rule, shares, notes)
    return decided


@task(cache_policy=NO_CACHE, task_run_name="merge step {decided.step}, shard {shard}")
def merge_shard(service: Service, decided: PlanRecord, shard: int) -> None:
    """Merge one of the window's shards, here or wherever the flow's task runner has this run."""
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
    return verdict
