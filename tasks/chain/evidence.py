"""What the records say of one published fusion, and how a comparison with it fails."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from ckptfuse.checkpoints import Contents
from ckptfuse.errors import RecordError
from ckptfuse.records import (
    AnyRecord,
    FusionRecord,
    GateRecord,
    Member,
    PlanRecord,
    PublicationRecord,
    RetirementRecord,
)
from ckptfuse.service import Service, plans_of


class Broken(Exception):
    """What differs."""


class Gone(Exception):
    """What is not there any more, for a reason that is no fault."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The records of one published fusion."""

    service: Service
    published: PublicationRecord
    plan: PlanRecord
    gate: GateRecord
    fusion: FusionRecord
    retired: RetirementRecord | None

    @classmethod
    def of(cls, service: Service, published: PublicationRecord) -> "Evidence":
        """Raises RecordError when one of them is not there."""
        records = service.records
        judged = {gate.window: gate for gate in records.all(GateRecord).values()}
        return cls(
            service,
            published,
            plan=_there(plans_of(service).get(published.window), PlanRecord),
            gate=_there(judged.get(published.window), GateRecord),
            fusion=_there(records.get(FusionRecord, published.fusion), FusionRecord),
            retired=records.get(RetirementRecord, published.fusion),
        )

    @property
    def inputs(self) -> list[Member]:
        """The checkpoints that decided bytes."""
        ancillary = self.plan.ancillary
        return [m for m in self.plan.members if m.weight or m.fingerprint == ancillary]

    def require_weights(self) -> None:
        """Raise Gone when retention deleted them."""
        if self.retired is not None:
            raise Gone(f"deleted by retention: {self.retired.reason}")


def _there(record: AnyRecord | None, kind: type[AnyRecord]) -> AnyRecord:
    if record is None:
        raise RecordError(f"the {kind.kind} record of this fusion is not in the workspace")
    return record


def broken(said: str) -> NoReturn:
    raise Broken(said)


def require_same(found: Mapping[str, object], expected: Mapping[str, object], what: str) -> None:
    """Raise Broken, naming the keys, unless all that is ``expected`` was found."""
    differ = [key for key, value in expected.items() if found.get(key) != value]
    if differ:
        broken(f"{what} differs in {', '.join(differ)}")


def require_contents(found: Contents, expected: Contents, where: str) -> None:
    """Raise Broken, naming the file, unless each has its size and content hash."""
    for path, (size, content) in expected.items():
        if path not in found:
            broken(f"{where}: {path} is missing")
        if found[path] != (size, content):
            broken(f"{where}: the bytes of {path} differ")


def sizes(contents: Contents) -> str:
    return f"{len(contents)} files ({sum(size for size, _ in contents.values()) / 1e6:.1f} MB)"
