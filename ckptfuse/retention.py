"""Retention: which published fusions stay in the registry and in DVC's cache.

What consumers can be sent to always stays: the champion, the one that a rollback would return
to, the newest, those that wait for their veto, and whatever an alias in MLflow points to.
"""

from collections.abc import Mapping, Sequence

from ckptfuse.params import RetentionParams
from ckptfuse.promotion import standing, waiting
from ckptfuse.published import find_publication, publications
from ckptfuse.records import PublicationRecord, RetirementRecord
from ckptfuse.service import Service


def why_kept(service: Service, aliases: Mapping[str, str]) -> dict[str, str]:
    """Fusion -> why it stays, of all published ones; whatever is not in it goes.

    ``aliases`` are the registry's: name -> fusion. Raises ConfigurationError when
    ``retention.keep`` names something that was never published.
    """
    known = publications(service)
    reasons = _by_policy(known, service.params.retention)
    for name in service.params.retention.keep:
        reasons[find_publication(service, name).fusion] = f"kept as {name}"
    if known:
        reasons[known[-1].fusion] = "the newest"
    reasons |= {record.fusion: "it waits for its veto" for record in waiting(service)}
    published = {record.fusion for record in known}
    reasons |= {fusion: f"alias {a}" for a, fusion in aliases.items() if fusion in published}
    for record, why in zip(reversed(standing(service)[-2:]), _CHAMPIONS, strict=False):
        reasons[record.fusion] = why
    retired = service.records.all(RetirementRecord)
    return {fusion: why for fusion, why in reasons.items() if fusion not in retired}


_CHAMPIONS = ("the champion", "the champion before")


def _by_policy(known: Sequence[PublicationRecord], params: RetentionParams) -> dict[str, str]:
    """What the numbers in params keep; retired ones count, so that every k-th stays the same."""
    if params.last is None:
        return {record.fusion: "all are kept" for record in known}
    reasons: dict[str, str] = {}
    if params.every is not None:
        reasons |= {r.fusion: f"one of every {params.every}" for r in known[:: params.every]}
    reasons |= {record.fusion: f"of the last {params.last}" for record in known[-params.last :]}
    return reasons
