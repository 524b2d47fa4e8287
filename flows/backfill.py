"""Replay a finished trajectory: every window is fused and judged, in the order of training."""

from prefect import flow

from flows.watch import Summary, watch


@flow(name="backfill", flow_run_name="backfill", persist_result=False)
def backfill(params_file: str, first: int | None = None, last: int | None = None) -> Summary:
    """The watch flow from step ``first`` to ``last``, with no window superseded by a later one."""
    return watch(params_file, live=False, first=first, last=last)
