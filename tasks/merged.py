"""Merged weights, where the workspace lacks them: the ledger's cache has them, or the registry.

With ``versions.weights: manifest`` the ledger has their hashes alone.
"""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from ckptfuse.digests import file_content
from ckptfuse.errors import CkptfuseError
from ckptfuse.merge.companions import PROVENANCE
from ckptfuse.new_folder import new_folder
from ckptfuse.records import FusionRecord, PublicationRecord
from ckptfuse.service import Service
from ckptfuse.store import link_file
from tasks.dvc_cache import DvcCache
from tasks.log import log
from tasks.packaging import is_weights
from tasks.registry import registry_of
from tasks.version import ledger_of


def bring_back(service: Service, fusion: str, tag: str) -> None:
    """A merge that was deleted from the workspace, if all of it is anywhere else.

    What is made of it once more then needs none of its checkpoints.
    """
    merged = service.records.get(FusionRecord, fusion)
    if merged is None or service.weights_of(fusion) is not None:
        return
    if _link(_in_ledger(service, tag), merged, service.workspace.model(fusion)):
        return
    try:
        with registry_of(service) as registry, ExitStack() as copies:
            version = registry.find_version(fusion)
            if version is not None and registry.missing(version, merged.sizes) is None:
                folder = copies.enter_context(registry.model_folder(registry.version(version)))
                found = {path: folder / path for path in merged.files}
                _link(found, merged, service.workspace.model(fusion))
    except CkptfuseError as error:
        log.warning("the weights of %s are not had from the registry: %s", tag, error)


def is_kept(service: Service, published: PublicationRecord) -> bool:
    """Whether ledger or registry have the weights, by the sizes of the files.

    Raises PublicationError when MLflow is asked and cannot be reached.
    """
    merged = service.records.get(FusionRecord, published.fusion)
    sizes = {} if merged is None else merged.sizes
    found = _in_ledger(service, published.tag)
    if sizes and sizes == {path: place.stat().st_size for path, place in found.items()}:
        return True
    with registry_of(service) as registry:
        version = registry.find_version(published.fusion)  # another server has other numbers
        return version is not None and registry.missing(version, sizes) is None


def _in_ledger(service: Service, tag: str) -> dict[str, Path]:
    ledger = ledger_of(service)
    return DvcCache(ledger).model(tag) if tag in ledger.tags() else {}


def _link(found: Mapping[str, Path], merged: FusionRecord, target: Path) -> bool:
    """Link these files into a new folder, if they are the fusion's to the byte."""
    if not found or {name: file_content(place) for name, place in found.items()} != merged.files:
        return False
    with new_folder(target, last=PROVENANCE) as folder:
        for name, place in found.items():
            lay = link_file if is_weights(Path(name)) else shutil.copyfile  # DVC's have no names
            lay(place, folder / name)
    return True
