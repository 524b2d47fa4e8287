"""The champion: by the records, and by the alias in MLflow, which follows them.

A promotion is a record first; the alias moves last. Whoever finds it behind the record moves it:
the next promotion, or the next look.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from ckptfuse.digests import digest
from ckptfuse.errors import PublicationError
from ckptfuse.promotion import (
    champion,
    promote_by_hand,
    rollback_by_hand,
    rollback_target,
    waiting,
)
from ckptfuse.published import find_publication, publications
from ckptfuse.records import (
    FusionRecord,
    PromotionRecord,
    PublicationRecord,
    RetirementRecord,
    VetoRecord,
)
from ckptfuse.service import Service
from ckptfuse.steps.promote import settle
from tasks.log import log
from tasks.marks import is_marked, mark
from tasks.registry import Registry, registry_of

CHAMPION = "champion"
_MARK, _WAITING = "champion", "candidates"


def promote(
    service: Service, chosen: PublicationRecord, *, by: str, reason: str
) -> PromotionRecord:
    """Make a published fusion the champion, by hand; again, it finds what is done.

    Raises PublicationError when its version cannot be loaded, or MLflow not be reached.
    """
    with registry_of(service) as registry:
        check_loadable(service, registry, chosen)
        record = promote_by_hand(service, chosen, by=by, reason=reason)
        follow_champion(service, registry)
    return record


def rollback(service: Service, *, by: str, reason: str) -> PromotionRecord:
    """Return to the champion before, or finish the rollback that was killed before the alias moved.

    An alias that is elsewhere for another reason (MLflow was restored from a backup, say) is no
    sign of such a one. Raises ConfigurationError when there was no champion before,
    PublicationError as ``promote`` does.
    """
    with registry_of(service) as registry:
        present = champion(service)
        is_followed = present is None or _is_followed(service, present)
        if follow_champion(service, registry) and present is not None:
            if present.undoes is not None and not is_followed:
                log.warning(
                    "the rollback of before (decision %d by %s: %s) was not finished: it is now, "
                    "and nothing else is taken back. `ckptfuse rollback` again goes further",
                    present.number, present.by, present.reason,
                )  # fmt: skip
                return present
            log.warning("the alias champion was not where the records have it; it is set by them")
        target = find_publication(service, rollback_target(service))
        check_loadable(service, registry, target)
        record = rollback_by_hand(service, target, by=by, reason=reason)
        follow_champion(service, registry)
    return record


def check_loadable(service: Service, registry: Registry, chosen: PublicationRecord) -> None:
    """Raise PublicationError unless the version is registered with all files of its model."""
    name = f"version {chosen.version} ({chosen.tag})"
    retired = service.records.get(RetirementRecord, chosen.fusion)
    if retired is not None:
        raise PublicationError(f"{name} was deleted by retention: {retired.reason}")
    fusion = service.records.get(FusionRecord, chosen.fusion)
    version = registry.find_version(chosen.fusion)  # another server has other numbers
    missing: str | None = "it is not registered any more"
    if version is not None:
        missing = registry.missing(version, fusion.sizes if fusion else {})
    if missing is not None:
        raise PublicationError(f"{name} of {chosen.model_name} would not load: {missing}")


def follow_champion(service: Service, registry: Registry) -> bool:
    """Move the alias to the champion of the records; whether it was elsewhere."""
    present = champion(service)
    if present is None:
        return False
    version = registry.find_version(present.fusion)
    if version is None:  # somebody deleted it in MLflow
        log.warning(
            "the champion of step %d has no version in the registry any more: "
            "`ckptfuse promote` or `ckptfuse rollback` chooses another",
            present.step,
        )
        mark(service, _MARK, str(present.number))
        return False
    behind = registry.aliases().get(CHAMPION) != version
    if behind:
        registry.set_alias(CHAMPION, version)
    mark(service, _MARK, str(present.number))
    return behind


def _is_followed(service: Service, present: PromotionRecord) -> bool:
    """Whether the alias was once seen where this decision wants it."""
    return is_marked(service, _MARK, str(present.number))


@dataclass(frozen=True, slots=True)
class Astray:
    """An alias that is not where the records have it; ``found``: the fusion it points to."""

    found: str | None
    champion: PromotionRecord

    def __str__(self) -> str:
        name = self.champion.fusion[:12]
        return (
            f"the alias {CHAMPION} points to {self.found[:12] if self.found else 'no fusion'}, and "
            f"the champion by the records is {name} of step {self.champion.step}; `ckptfuse "
            f"promote {name}` moves it there"
        )


def astray(service: Service, registry: Registry) -> Astray | None:
    """None where consumers are sent to the champion of the records, or there is none yet."""
    present = champion(service)
    found = registry.aliased().get(CHAMPION)
    return None if present is None or found == present.fusion else Astray(found, present)


def tell(service: Service, step: int, version: str, promotion: PromotionRecord | None) -> None:
    """What was decided on it, now or, of one that is published again, before."""
    if promotion is None:
        log.info("step %d is version %s, candidate: `ckptfuse veto` is next", step, version)
        return
    present = champion(service)
    is_champion = present is not None and present.fusion == promotion.fusion
    kind = "champion" if is_champion else "candidate"
    log.info("step %d is version %s, %s: %s", step, version, kind, promotion.reason)


def is_settled(service: Service) -> bool:
    """Whether nothing came that candidates wait for, and the alias is where the records have it.

    A candidate may wait for its veto for days, with a look a minute.
    """
    present = champion(service)
    answers = service.records.keys(VetoRecord)
    if waiting(service) and not is_marked(service, _WAITING, _heard(service, answers)):
        return False
    return present is None or _is_followed(service, present)


def _heard(service: Service, answers: Iterable[str]) -> str:
    """Digest of all that decides on candidates; ``answers``: the keys of veto records."""
    present = champion(service)
    return digest(
        [
            [record.fusion for record in waiting(service)],
            present.number if present else 0,
            sorted(answers),
            service.params.promotion.model_dump(mode="json"),
            service.scorer.corpus_digest(),
        ]
    )


@task(cache_policy=NO_CACHE)
def settle_champion(service: Service) -> list[PromotionRecord]:
    """Decide on candidates whose veto was heard since, and bring the alias up to the records.

    Returns what was decided. A registry that is down waits for the next run.
    """
    versions = {record.fusion: record.version for record in publications(service)}
    answers = service.records.keys(VetoRecord)  # before: `ckptfuse veto` may bring one meanwhile
    settled = settle(service)
    for promotion in settled:
        tell(service, promotion.step, versions[promotion.fusion], promotion)
    if waiting(service):
        mark(service, _WAITING, _heard(service, answers))
    present = champion(service)
    if present is None or _is_followed(service, present):
        return settled  # without loading MLflow
    try:
        with registry_of(service) as registry:
            if follow_champion(service, registry):
                log.info("the alias champion now points to step %d", present.step)
    except PublicationError as error:
        log.warning("the alias champion waits for the next run: %s", error)
    return settled
