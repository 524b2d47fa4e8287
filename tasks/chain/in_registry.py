"""Links through MLflow: the version's tags, the run's copies of the records, the packaged model."""

from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from ckptfuse.digests import file_content
from ckptfuse.promotion import champion
from ckptfuse.records import GateRecord, PlanRecord, Record
from tasks.aliases import CHAMPION, astray
from tasks.chain.evidence import (
    Evidence,
    Gone,
    broken,
    require_contents,
    require_same,
    sizes,
)
from tasks.ledger import LedgerEntry
from tasks.registry import Registry, version_tags


class RegistryLinks:
    """``held`` outlives the links: what it keeps (a copy, from afar) is brought once."""

    def __init__(self, evidence: Evidence, registry: Registry, held: ExitStack) -> None:
        self.evidence = evidence
        self.registry = registry
        self._held = held

    def version(self) -> str:
        """Its tags are what the records give."""
        evidence, published = self.evidence, self.evidence.published
        evidence.require_weights()
        entry = LedgerEntry(published.tag, published.commit, published.weights_hash)
        expected = version_tags(evidence.plan, evidence.gate, entry)
        found = self._version().tags
        # A release before may have set fewer tags.
        held = {tag: value for tag, value in expected.items() if tag in found}
        require_same(found, held, "what the version's tags and the records say")
        return f"{published.model_name} version {published.version} has the tags of the records"

    def alias(self) -> str:
        """Consumers are sent to it if it is the champion, and only then."""
        service, own = self.evidence.service, self.evidence.published.fusion
        found = astray(service, self.registry)
        if found is not None and own in (found.found, found.champion.fusion):
            broken(str(found))
        present = champion(service)
        if present is None or present.fusion != own:
            return f"it is not the champion, and has not the alias {CHAMPION}"
        return f"it is the champion, and has the alias {CHAMPION}"

    def run(self) -> str:
        """The plan and the verdict are those of the time when the version was made."""
        found = self.registry.fusion_records(self.evidence.published.fusion)
        if found is None:
            raise Gone("its run was deleted from MLflow")
        plan, gate = found
        _require_same_record(PlanRecord.model_validate(plan), self.evidence.plan)
        _require_same_record(GateRecord.model_validate(gate), self.evidence.gate)
        return "plan.json and gate.json are the records"

    def packaged(self) -> str:
        """The files that consumers load are those that fusion.json names, and itself."""
        self.evidence.require_weights()
        found = {path: file_content(place) for path, place in self.files.items()}
        version = self.evidence.published.version
        require_contents(found, self.evidence.fusion.files, f"version {version}")
        return f"{sizes(found)} of the registered model have the hashes of fusion.json"

    @cached_property
    def files(self) -> dict[str, Path]:
        """The files of the weights' folder, where they lie or as a copy for a while."""
        folder = self._held.enter_context(self.registry.model_folder(self._version()))
        places = (path for path in folder.rglob("*") if path.is_file())
        return {place.relative_to(folder).as_posix(): place for place in places}

    def _version(self) -> Any:
        published = self.evidence.published
        found = self.registry.version(published.version)
        if found is None:
            broken(f"{published.model_name} has no version {published.version} (any more)")
        return found


def _require_same_record(logged: Record, record: Record) -> None:
    require_same(
        record.model_dump(mode="json"), logged.model_dump(mode="json"), f"the {record.kind} record"
    )
