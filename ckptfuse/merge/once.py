"""Merge by hand: no service and no parameters file."""

from collections.abc import Sequence

from ckptfuse.checkpoints import Contents, open_checkpoint
from ckptfuse.errors import ConfigurationError
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.fusion import FusionSpec, check_weights
from ckptfuse.merge.folder import write_fusion
from ckptfuse.merge.inputs import open_inputs
from ckptfuse.merge.passes import Progress, ignore
from ckptfuse.store import FolderStore, Store, open_store


def merge_once(
    out: str,
    checkpoints: Sequence[str],
    weights: Sequence[float],
    *,
    dtype: str | None = None,
    progress: Progress = ignore,
) -> tuple[FusionSpec, Contents]:
    """Merge checkpoints, oldest first, into a new folder or S3 prefix.

    Configuration, tokenizer and sharding are the last checkpoint's.
    """
    opened = [open_checkpoint(uri) for uri in checkpoints]
    chosen = check_weights(weights)
    used = [checkpoint for checkpoint, weight in zip(opened, chosen, strict=True) if weight]
    inputs = open_inputs(used, opened[-1], dtype)
    target = open_store(out)
    if _is_taken(target):
        raise ConfigurationError(f"{out} is there already and not empty; choose another place")
    distinct = {checkpoint.uri: checkpoint for checkpoint in [*used, opened[-1]]}
    prints = {uri: fingerprint_of(checkpoint) for uri, checkpoint in distinct.items()}
    spec = FusionSpec(
        fingerprints=tuple(prints[checkpoint.uri] for checkpoint in used),
        weights=tuple(weight for weight in chosen if weight),
        ancillary=prints[opened[-1].uri],
        dtype=dtype,
    )
    return spec, write_fusion(inputs, spec, target, progress)


def _is_taken(target: Store) -> bool:
    if isinstance(target, FolderStore):
        return target.root.exists() and (not target.root.is_dir() or any(target.root.iterdir()))
    return bool(target.list())
