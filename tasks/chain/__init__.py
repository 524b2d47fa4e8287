"""Verify: the chain from a model version to the checkpoints that it was made of, link by link.

    records <-> model version <-> packaged model -------\
       |                                                 > fusion.json <-> source checkpoints
       +------> tag -> commit -> dvc.lock -> DVC's cache /

With ``versions.weights: manifest`` the cache has a copy of fusion.json, and the weights are those
of the packaged model.

Every link is looked at afresh and all bytes are read. Each compares with the records, so that one
broken link does not hide the others.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from socket import gaierror
from typing import Literal

from ckptfuse.errors import CkptfuseError, MissingFile, StoreError
from ckptfuse.published import find_publication
from ckptfuse.service import Service
from tasks.chain.evidence import Broken, Evidence, Gone
from tasks.chain.in_bucket import source_fits
from tasks.chain.in_ledger import LedgerLinks
from tasks.chain.in_registry import RegistryLinks
from tasks.registry import registry_of


@dataclass(frozen=True, slots=True)
class Link:
    """One link of the chain, and what was compared.

    ``gone``: there is nothing left to compare. ``unchecked``: what it is to be compared with was
    out of reach, which says nothing of it.
    """

    name: str
    state: Literal["holds", "broken", "gone", "unchecked"]
    said: str


def verify(service: Service, name: str) -> Iterator[Link]:
    """Check all links of a published fusion (tag, step, version or id), one after the other.

    Raises ConfigurationError when there is no such fusion, RecordError when a record of it cannot
    be read, PublicationError when MLflow cannot be reached.
    """
    evidence = Evidence.of(service, find_publication(service, name))
    with registry_of(service) as registry, ExitStack() as held:
        registered = RegistryLinks(evidence, registry, held)
        committed = LedgerLinks(evidence, registered)
        for link, check in _links(evidence, registered, committed):
            try:
                yield Link(link, "holds", check())
            except Gone as error:
                yield Link(link, "gone", str(error))
            except Broken as error:
                yield Link(link, "broken", str(error))
            except Exception as error:  # a damaged file can fail its reader in any way
                said = str(error)
                if not isinstance(error, CkptfuseError):
                    said = f"cannot be compared: {type(error).__name__}: {error}"
                yield Link(link, "unchecked" if _out_of_reach(error) else "broken", said)


def _out_of_reach(error: BaseException | None) -> bool:
    """Whether a store or a server did not answer, or not us, as whatever library tells it."""
    from botocore.exceptions import BotoCoreError
    from mlflow.exceptions import RestException

    while error is not None:
        if isinstance(error, StoreError) and not isinstance(error, MissingFile):
            return True
        if isinstance(error, (ConnectionError, TimeoutError, gaierror, BotoCoreError)):
            return True
        if isinstance(error, RestException) and error.get_http_status_code() >= 500:
            return True
        error = error.__cause__ or error.__context__
    return False


def _links(
    evidence: Evidence, registered: RegistryLinks, committed: LedgerLinks
) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "version -> records", registered.version
    yield "alias -> records", registered.alias
    yield "run -> records", registered.run
    yield "tag -> commit", committed.tag
    yield "commit -> its files", committed.commit
    yield "commit -> records", committed.window
    yield "commit -> dvc.lock", committed.lock
    yield "dvc.lock -> DVC cache", committed.cache_holds
    yield "DVC cache -> scores", committed.scores
    yield "DVC cache -> fusion.json", committed.provenance
    yield "version -> fusion.json", registered.packaged
    for member in evidence.inputs:
        yield (
            f"input {member.name}",
            lambda member=member: source_fits(evidence.service, member),  # type: ignore[misc]
        )
