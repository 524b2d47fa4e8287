"""Delete what the policy keeps no longer: workspace copies, and published fusions altogether.

Of a retired fusion go its version, its packaged model, its weights in DVC's cache and the
checkpoints that were held for it alone; its tag, its commit, its run and all records stay, so it
can still be made again from its checkpoints, while their trainer keeps them.
`dvc gc` is not asked: it takes whatever the commits that one names do not need.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptfuse.digests import digest
from ckptfuse.promotion import champion, waiting
from ckptfuse.published import publications
from ckptfuse.records import (
    FusionRecord,
    GateRecord,
    PlanRecord,
    PruneRecord,
    PublicationRecord,
    RetirementRecord,
)
from ckptfuse.retention import why_kept
from ckptfuse.service import Service, plans_of
from ckptfuse.store import remove_folder
from tasks import held
from tasks.artifacts import local_folder
from tasks.dvc_cache import FOLDER, DvcCache
from tasks.log import log
from tasks.marks import is_marked, mark
from tasks.merged import is_kept
from tasks.registry import Registry, registry_of
from tasks.version import ledger_of

_MARK, _LAST = "retired", "last copies"
_DONE = "done"


@dataclass(frozen=True, slots=True)
class Stale:
    """Merged weights in the workspace that nobody needs there, and why.

    ``published``: where they are kept, which is looked at before they are deleted.
    """

    fusion: str
    folder: Path
    reason: str
    published: PublicationRecord | None = None


@dataclass(frozen=True, slots=True)
class Outlook:
    """What stays, why, and what goes; the bytes of disk that come back, and what is held."""

    kept: tuple[tuple[PublicationRecord, str], ...]
    going: tuple[PublicationRecord, ...]
    stale: tuple[Stale, ...]
    freed: int
    holding: held.Cost


@dataclass(frozen=True, slots=True)
class Deleted:
    """What was deleted and why; ``freed`` are bytes of this machine's disk."""

    name: str
    reason: str
    freed: int


# -- the workspace's copies ----------------------------------------------------------------------


def stale_models(service: Service) -> list[Stale]:
    """Declined and corrected fusions, and published ones that nothing is needed of any more.

    The champion, the newest and those that wait for their veto stay.
    """
    records = service.records
    known = publications(service)
    present = champion(service)
    keep = {record.fusion for record in (*waiting(service), *known[-1:])}
    if present:
        keep.add(present.fusion)
    copies = {path.name: path for path in service.workspace.folder("models").iterdir()}
    merged = {f: path for f, path in copies.items() if records.has(FusionRecord, f)}
    if not merged.keys() - keep:
        return []  # without reading every plan
    published = {record.fusion: record for record in known}
    declined = {g.fusion: g for g in records.all(GateRecord).values() if g.verdict == "declined"}
    corrected = _corrected(service)
    found = []
    for fusion, folder in merged.items():
        if fusion in keep:
            continue
        if fusion in published:
            found.append(Stale(fusion, folder, "published, and kept elsewhere", published[fusion]))
        elif fusion in declined:
            found.append(Stale(fusion, folder, f"declined: {declined[fusion].reason}"))
        elif fusion in corrected:
            reason = "its rule corrected the weights once it was scored"
            found.append(Stale(fusion, folder, reason))
    return found


def _corrected(service: Service) -> set[str]:
    """Fusions of judged windows that are not what was judged."""
    judged = {verdict.window for verdict in service.records.all(GateRecord).values()}
    plans = service.records.all(PlanRecord).values()
    current = {plan.fusion for plan in plans_of(service).values()}
    return {plan.fusion for plan in plans if plan.window in judged} - current


def _has_another(service: Service, published: PublicationRecord) -> bool:
    """Whether ledger or registry have a copy too; tells where that is not so."""
    if published.fusion in service.records.keys(RetirementRecord) or is_kept(service, published):
        return True  # the first was deleted on purpose
    log.warning(
        "the workspace's copy of %s stays: neither ledger nor registry has all of its files",
        published.tag,
    )
    return False


# -- published fusions ---------------------------------------------------------------------------


def outlook(service: Service) -> Outlook:
    """What would go and stay now; changes nothing. Raises as ``why_kept`` and the registry do."""
    stale = stale_models(service)
    paths = {path for item in stale for path in _files(item.folder)}
    if not publications(service):
        return Outlook((), (), tuple(stale), freed_bytes(paths), held.cost(service))
    with registry_of(service) as registry:
        kept, going = _sorted_out(service, registry)
        gone = _gone(service) | {record.tag for record in going}
        for record in going:
            paths |= _files_of(service, registry, record.fusion, record.tag, gone)
    return Outlook(kept, going, tuple(stale), freed_bytes(paths), held.cost(service))


def prune_copies(service: Service) -> Iterator[Deleted]:
    """Delete the workspace's copies that nobody needs there, one after the other.

    Raises PublicationError where MLflow must be asked for another copy and cannot be reached.
    """
    last = []
    for item in stale_models(service):
        if item.published is not None and not _has_another(service, item.published):
            last.append(item.fusion)
            continue
        freed = freed_bytes(_files(item.folder))
        record = PruneRecord(fusion=item.fusion, folder=str(item.folder), reason=item.reason)
        service.records.put(item.fusion, record)
        remove_folder(item.folder)
        yield Deleted(f"the workspace's copy of {item.fusion[:12]}", item.reason, freed)
    mark(service, _LAST, _lasting(service, last))


def copies_are_pruned(service: Service) -> bool:
    """Whether nothing is stale, but for last copies that were found to be so."""
    stale = [item.fusion for item in stale_models(service)]
    return not stale or is_marked(service, _LAST, _lasting(service, stale))


def _lasting(service: Service, fusions: list[str]) -> str:
    return digest([sorted(fusions), state(service)])


def prune_published(service: Service) -> Iterator[Deleted]:
    """Delete the published fusions that would go, one after the other.

    Each record comes first; a deletion that was killed is finished by the next call.
    """
    if not publications(service):
        return
    with registry_of(service) as registry:
        for published in _sorted_out(service, registry)[1]:
            service.records.put(published.fusion, _retirement(service, published))
        for retired in service.records.all(RetirementRecord).values():
            if not is_marked(service, f"{_MARK}-{retired.fusion}", _DONE):
                freed = _delete(service, registry, retired)
                mark(service, f"{_MARK}-{retired.fusion}", _DONE)
                yield Deleted(f"version {retired.version} ({retired.tag})", retired.reason, freed)
    mark(service, _MARK, state(service))


def is_settled(service: Service) -> bool:
    """Whether nothing has changed, but for aliases, since all was deleted that had to go."""
    return not publications(service) or is_marked(service, _MARK, state(service))


def state(service: Service) -> str:
    """Digest of all that decides what stays, but for aliases that people move in MLflow."""
    present = champion(service)
    return digest(
        [
            [record.fusion for record in publications(service)],
            sorted(service.records.all(RetirementRecord)),
            service.params.retention.model_dump(mode="json"),
            present.number if present else 0,
        ]
    )


def _sorted_out(
    service: Service, registry: Registry
) -> tuple[tuple[tuple[PublicationRecord, str], ...], tuple[PublicationRecord, ...]]:
    """What stays, with the reason, and what goes."""
    reasons = why_kept(service, registry.aliased())
    retired = service.records.all(RetirementRecord)
    known = [record for record in publications(service) if record.fusion not in retired]
    kept = tuple((r, reasons[r.fusion]) for r in known if r.fusion in reasons)
    return kept, tuple(r for r in known if r.fusion not in reasons)


def _retirement(service: Service, record: PublicationRecord) -> RetirementRecord:
    policy = service.params.retention
    every = f", nor one of every {policy.every}" if policy.every else ""
    return RetirementRecord(
        fusion=record.fusion,
        step=record.step,
        tag=record.tag,
        version=record.version,
        reason=f"not of the last {policy.last}{every}, nor kept by name",
    )


def _gone(service: Service) -> set[str]:
    return {record.tag for record in service.records.all(RetirementRecord).values()}


def _delete(service: Service, registry: Registry, retired: RetirementRecord) -> int:
    """Delete a fusion's files; the bytes freed."""
    files = _files_of(service, registry, retired.fusion, retired.tag, _gone(service))
    freed = freed_bytes(files)
    registry.delete(retired.fusion)
    for path in sorted(files, key=lambda path: path.suffix == FOLDER):  # DVC's list of them last
        path.unlink(missing_ok=True)
    remove_folder(service.workspace.model(retired.fusion))
    held.release(service, retired.tag)
    return freed


def _files_of(
    service: Service, registry: Registry, fusion: str, tag: str, gone: Collection[str]
) -> set[Path]:
    """All files on this machine that go with a fusion."""
    folders = [local_folder(location) for location in registry.artifacts(fusion)]
    packaged = {path for folder in folders if folder for path in _files(folder)}
    objects = DvcCache(ledger_of(service)).only_of(tag, gone)
    copies = held.only_of(service, tag, gone)
    return packaged | objects | copies | _files(service.workspace.model(fusion))


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def freed_bytes(paths: Iterable[Path]) -> int:
    """Disk space (bytes) that comes back when these files go.

    Those with a hard link elsewhere give nothing back.
    """
    found = [path.lstat() for path in paths if path.exists()]
    links = Counter((info.st_dev, info.st_ino) for info in found)
    blocks = {
        (info.st_dev, info.st_ino): info.st_blocks
        for info in found
        if links[info.st_dev, info.st_ino] == info.st_nlink
    }
    return sum(blocks.values()) * 512
