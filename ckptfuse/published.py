"""Published fusions in their order; and which one a person means: by tag, step, version or id."""

from collections.abc import Iterable

from ckptfuse.errors import ConfigurationError
from ckptfuse.records import GateRecord, PublicationRecord
from ckptfuse.service import Service

_SHORTEST_ID = 6
_SHOWN = 8


def publications(service: Service) -> list[PublicationRecord]:
    """All that was ever published, one of each fusion, in the order of publication.

    The first of each: under other parameters the same fusion may pass again, and is the same
    version, run, commit and tag.
    """
    first: dict[str, PublicationRecord] = {}
    for record in in_order_of_publication(service, service.records.all(PublicationRecord).values()):
        first.setdefault(record.fusion, record)
    return list(first.values())


def in_order_of_publication(
    service: Service, records: Iterable[PublicationRecord]
) -> list[PublicationRecord]:
    """Publication follows the gate's tests. Versions begin anew on another server."""
    tests = {gate.window: gate.test for gate in service.records.all(GateRecord).values()}
    return sorted(records, key=lambda r: (tests.get(r.window, 0), int(r.version)))


def find_publication(service: Service, name: str) -> PublicationRecord:
    """The published fusion called ``name``: a tag, ``v3``, a number, or an id's beginning.

    A bare number is a step or a version. Raises ConfigurationError when nothing published is
    called so, or more than one fusion.
    """
    known = publications(service)
    found = [record for record in known if _is_called(record, name)]
    if len(found) == 1:
        return found[0]
    shown = (found or known)[-_SHOWN:]
    listed = ", ".join(f"v{r.version} ({r.tag})" for r in shown) or "none yet"
    if found:
        raise ConfigurationError(f"{name!r} may be any of {listed}; say which by its tag")
    declined = _declined(service, name)
    raise ConfigurationError(f"{name!r} was never published{declined}; published last: {listed}")


def _is_called(record: PublicationRecord, name: str) -> bool:
    if name in (record.tag, record.fusion, f"v{record.version}", record.version, str(record.step)):
        return True
    return len(name) >= _SHORTEST_ID and record.fusion.startswith(name)


def _declined(service: Service, name: str) -> str:
    """What the gate said against it, if that is why."""
    said = [
        gate.reason
        for gate in service.records.all(GateRecord).values()
        if gate.verdict == "declined" and name in (str(gate.step), gate.fusion, gate.fusion[:12])
    ]
    return f" (declined: {said[0]})" if said else ""
