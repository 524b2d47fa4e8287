"""Delete merged weights that nobody needs, in the workspace, the registry and DVC's cache."""

import time

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.errors import CkptfuseError
from ckptfuse.service import Service
from tasks import retention
from tasks.log import log
from tasks.marks import is_marked, mark

_FAILED = "prune failed"


def is_pruned(service: Service) -> bool:
    """Or it failed within this hour: whatever is in the way, not every look has to run into it."""
    if is_marked(service, _FAILED, _tried(service)):
        return True
    return retention.copies_are_pruned(service) and retention.is_settled(service)


def _tried(service: Service) -> str:
    """Is another when there is more to delete, the policy is corrected, or an hour is over."""
    return f"{retention.state(service)} {int(time.time() // 3600)}"


@task(cache_policy=NO_CACHE)
def prune(service: Service) -> None:
    """Apply the policy; a registry that is down, or a wrong name in it, waits for the next hour."""
    try:
        for item in retention.prune_copies(service):
            _tell(item)
        if retention.is_settled(service):
            return  # without loading MLflow
        for item in retention.prune_published(service):
            _tell(item)
    except (CkptfuseError, OSError) as error:
        mark(service, _FAILED, _tried(service))
        log.warning(
            "not all was deleted that retention does not keep: %s. It is tried again within the "
            "hour, or by ckptfuse prune",
            error,
        )


def _tell(item: retention.Deleted) -> None:
    log.info("deleted %s (%.1f MB): %s", item.name, item.freed / 1e6, item.reason)
