"""Look into the bucket and at the records: what is to be done?"""

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.corpus.survey import near_duplicates_of
from ckptfuse.listing import Listing
from ckptfuse.plan import Actions, Quarantine, Skip, State
from ckptfuse.service import Service
from ckptfuse.steps import look, survey
from tasks import news
from tasks.log import log
from tasks.retries import transient


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5, retry_condition_fn=transient)
def discover(service: Service) -> tuple[Listing, State]:
    """List the bucket and read the records."""
    return look.discover(service)


@task(cache_policy=NO_CACHE)
def survey_corpus(service: Service) -> None:
    """Look through the corpus, once, and tell of what a person may want to remove from it."""
    record, is_new = survey.survey_corpus(service)
    if is_new:
        for sentence in near_duplicates_of(record):
            log.warning("corpus, %s", sentence)


@task(cache_policy=NO_CACHE)
def plan_actions(service: Service, listing: Listing, state: State, live: bool) -> Actions:
    """Compare the listing with the records."""
    return look.next_actions(service, listing, state, live=live)


@task(cache_policy=NO_CACHE, task_run_name="quarantine {item.checkpoint.name}")
def quarantine(service: Service, item: Quarantine) -> None:
    """Set a checkpoint aside for good."""
    look.quarantine(service, item)
    news.quarantined(service, item.checkpoint, item.reason)


@task(cache_policy=NO_CACHE, task_run_name="skip step {item.step}")
def skip(service: Service, item: Skip) -> None:
    """Record that a window is not fused."""
    look.skip(service, item)
    log.info("step %d is not fused: %s", item.step, item.reason)
