"""Delete merged weights that nobody needs, in the workspace, the registry and DVC's cache."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.errors import CkptfuseError
from ckptfuse.service import Service
from tasks import retention
from tasks.log import log


def is_pruned(service: Service) -> bool:
    return retention.copies_are_pruned(service) and retention.is_settled(service)


@task(cache_policy=NO_CACHE)
def prune(service: Service) -> None:
    """Apply the policy; a registry that is down, or a wrong name in it, waits for the next run."""
    try:
        for item in retention.prune_copies(service):
            _tell(item)
        if retention.is_settled(service):
            return  # without loading MLflow
        for item in retention.prune_published(service):
            _tell(item)
    except CkptfuseError as error:
        log.warning("not all was deleted that retention does not keep: %s", error)


def _tell(item: retention.Deleted) -> None:
    log.info("deleted %s (%.1f MB): %s", item.name, item.freed / 1e6, item.reason)
