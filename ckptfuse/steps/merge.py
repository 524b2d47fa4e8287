"""Merge: from a plan to the fusion's folder in the workspace, at once or in shards beforehand."""

from collections.abc import Sequence
from pathlib import Path

from ckptfuse.checkpoints import Checkpoint, Contents, open_checkpoint
from ckptfuse.errors import ChangedCheckpoint, IncompleteCheckpoint, StoreError
from ckptfuse.fusion import FusionSpec
from ckptfuse.merge import folder as merging
from ckptfuse.merge.inputs import Inputs, open_inputs
from ckptfuse.records import FusionRecord, Member, PlanRecord
from ckptfuse.service import Service
from ckptfuse.steps.weigh import spec_of
from ckptfuse.store import FolderStore, remove_folder


def merged(service: Service, decided: PlanRecord) -> FusionRecord | None:
    """The fusion, if it is merged and its folder still there."""
    if service.weights_of(decided.fusion) is None:
        return None
    return service.records.get(FusionRecord, decided.fusion)


def merge_shard(service: Service, decided: PlanRecord, shard: int) -> None:
    """Merge shard ``shard`` of ``fuse.shards``; `merge_fusion` then finds its files done."""
    spec, members = _spec_and_members(service, decided)
    target = FolderStore(service.workspace.model(decided.fusion))
    inputs = _open(spec, members)
    merging.merge_shard(inputs, spec.narrowed(), target, shard, service.params.fuse.shards)


def merge_fusion(service: Service, decided: PlanRecord) -> FusionRecord:
    """The fusion's folder in the workspace, complete."""
    known = merged(service, decided)
    if known is not None:
        return known
    folder = service.workspace.model(decided.fusion)
    remove_folder(folder)  # merged, but not yet recorded, by a run that was killed
    files = make_fusion(service, *_spec_and_members(service, decided), folder)
    record = FusionRecord(
        fusion=decided.fusion,
        step=decided.step,
        size=sum(size for size, _ in files.values()),
        files=files,
    )
    service.records.put(decided.fusion, record)
    for left in folder.parent.glob(".*"):  # of merges that were given up; ours was taken up again
        remove_folder(left)
    return record


def make_fusion(
    service: Service, spec: FusionSpec, members: Sequence[Checkpoint], folder: Path
) -> Contents:
    """Merge into a local folder. ``members`` are all of ``spec``'s, the ancillary one last."""
    inputs, scoring = _open(spec, members), service.params.scoring
    if scoring.model is None:
        return merging.write_fusion(inputs, spec.narrowed(), FolderStore(folder))
    from ckptfuse.merge.converted import write_converted  # needs torch

    return write_converted(
        inputs, spec.narrowed(), folder, converter=scoring.converter, model=scoring.model
    )


def _spec_and_members(
    service: Service, decided: PlanRecord
) -> tuple[FusionSpec, Sequence[Checkpoint]]:
    newest = decided.members[-1]
    needed = [  # others may be gone by now
        service.placed(m) for m in decided.members if m.weight or m is newest
    ]
    spec = spec_of(service, needed, [m.weight for m in needed])
    return spec, [_open_member(service, m) for m in needed]


def _open_member(service: Service, member: Member) -> Checkpoint:
    """Where it lies or, where it is not (whole, or as it was) any more, the copy held of it."""
    try:
        return open_checkpoint(member.uri, member.signature)
    except (StoreError, IncompleteCheckpoint, ChangedCheckpoint):
        copy = service.workspace.held(member.fingerprint)
        if copy is None:
            raise
        return open_checkpoint(str(copy))


def _open(spec: FusionSpec, members: Sequence[Checkpoint]) -> Inputs:
    used = [c for c, weight in zip(members, spec.weights, strict=True) if weight]
    return open_inputs(used, members[-1], spec.recipe)
