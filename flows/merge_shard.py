"""What a worker does for a fuse elsewhere: merge one shard of a fusion (``fuse.shards``)."""

from prefect import flow

from ckptfuse.errors import RecordError
from ckptfuse.records import PlanRecord
from flows.opening import open_flow
from tasks.fuse import merge_shard as merge_shard_task


@flow(name="merge-shard", persist_result=False)
def merge_shard(params_file: str, plan: str, shard: int) -> None:
    """Merge a shard of the plan with this key. Whoever handed it over completes the fusion."""
    service = open_flow(params_file)
    decided = service.records.get(PlanRecord, plan)
    if decided is None:
        raise RecordError(f"{service.workspace.root}: no plan {plan} to merge a shard of")
    merge_shard_task(service, decided, shard)
