"""What a look sets down: the corpus as it is, checkpoints set aside, windows left out."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.corpus.survey import near_duplicates_of
from ckptfuse.plan import Quarantine, Skip
from ckptfuse.service import Service
from ckptfuse.steps import look, survey
from tasks import news
from tasks.log import log


@task(cache_policy=NO_CACHE)
def survey_corpus(service: Service) -> None:
    """Look through the corpus, once, and tell of what a person may want to remove from it."""
    for sentence in near_duplicates_of(survey.survey_corpus(service)):
        log.warning("corpus, %s", sentence)


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
