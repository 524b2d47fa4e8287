"""Merge: from a plan to the fusion's folder in the workspace."""

from collections.abc import Sequence
from pathlib import Path

from ckptfuse.checkpoints import Checkpoint, Contents, open_checkpoint
from ckptfuse.fusion import FusionSpec
from ckptfuse.merge.folder import write_fusion
from ckptfuse.merge.inputs import open_inputs
from ckptfuse.records import FusionRecord, PlanRecord
from ckptfuse.service import Service
from ckptfuse.steps.weigh import spec_of
from ckptfuse.store import FolderStore, remove_folder


def merge_fusion(service: Service, decided: PlanRecord) -> FusionRecord:
    """The fusion's folder in the workspace, complete."""
    known = service.records.get(FusionRecord, decided.fusion)
    if known is not None and Path(known.folder).is_dir():
        return known
    folder = service.workspace.model(decided.fusion)
    remove_folder(folder)  # merged, but not yet recorded, by a run that was killed
    newest = decided.members[-1]
    needed = [m for m in decided.members if m.weight or m is newest]  # others may be gone by now
    spec = spec_of(service, needed, [m.weight for m in needed])
    opened = [open_checkpoint(m.uri, m.signature) for m in needed]
    files = make_fusion(spec, opened, folder)
    record = FusionRecord(
        fusion=decided.fusion,
        step=decided.step,
        folder=str(folder),
        size=sum(size for size, _ in files.values()),
        files=files,
    )
    service.records.put(decided.fusion, record)
    for left in folder.parent.glob(".*"):  # of merges that were given up; ours was taken up again
        remove_folder(left)
    return record


def make_fusion(spec: FusionSpec, members: Sequence[Checkpoint], folder: Path) -> Contents:
    """Merge into a local folder. ``members`` are all of ``spec``'s, the ancillary one last."""
    used = [c for c, weight in zip(members, spec.weights, strict=True) if weight]
    inputs = open_inputs(used, members[-1], spec.recipe)
    return write_fusion(inputs, spec.narrowed(), FolderStore(folder))
