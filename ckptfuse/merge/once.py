"""Merge by hand: no service and no parameters file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ckptfuse.checkpoints import Contents, distributed_metadata, open_checkpoint
from ckptfuse.digests import digest
from ckptfuse.errors import ConfigurationError
from ckptfuse.fusion import FusionSpec, Recipe, check_weights
from ckptfuse.layouts import Layout, matches
from ckptfuse.merge.folder import is_unfinished, write_and_identify
from ckptfuse.merge.inputs import open_inputs
from ckptfuse.merge.tally import Progress, ignore
from ckptfuse.store import FolderStore, Store, open_store


def merge_once(
    out: str,
    checkpoints: Sequence[str],
    weights: Sequence[float],
    *,
    recipe: Recipe | None = None,
    progress: Progress = ignore,
) -> tuple[FusionSpec, Contents]:
    """Merge checkpoints, oldest first, into a new folder or S3 prefix.

    Configuration, tokenizer and sharding are the last checkpoint's. Raises ConfigurationError where
    a pattern of the recipe names none of its tensors: misspelt, it would be merged, or copied.
    """
    opened = [open_checkpoint(uri) for uri in checkpoints]
    chosen = check_weights(weights)
    used = [checkpoint for checkpoint, weight in zip(opened, chosen, strict=True) if weight]
    recipe = recipe or Recipe()
    inputs = open_inputs(used, opened[-1], recipe)
    _check_patterns(recipe, inputs.ancillary)
    target = open_store(out)
    used_weights = [weight for weight in chosen if weight]
    signatures = [checkpoint.signature for checkpoint in [*used, opened[-1]]]
    key = digest([signatures, [weight.hex() for weight in used_weights], recipe.describe()])
    if isinstance(target, FolderStore) and _cannot_be_renamed_to(target.root):
        raise ConfigurationError(
            f"{out} is a link or a mounted folder, and a merge appears as a new one; name a folder "
            "inside it"
        )
    if _is_taken(target) and not is_unfinished(target, key):
        raise ConfigurationError(f"{out} is there already and not empty; choose another place")
    return write_and_identify(inputs, used_weights, key, target, progress)


def _check_patterns(recipe: Recipe, layout: Layout) -> None:
    names = {*layout.tensors, *layout.entries}
    for option, patterns in {"--copy": recipe.copied, "--master": recipe.masters}.items():
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in names):
                raise ConfigurationError(
                    f"{option} {pattern!r}: no tensor of {layout.checkpoint.uri} has such a name; "
                    f"one is called {min(names)!r}"
                )


def form_of(uri: str) -> Literal["safetensors", "dcp"]:
    """The form of a checkpoint that a merge keeps unless told otherwise."""
    paths = (entry.path for entry in open_checkpoint(uri).files)
    return "dcp" if distributed_metadata(paths) is not None else "safetensors"


def _cannot_be_renamed_to(folder: Path) -> bool:
    return folder.is_symlink() or folder.is_mount()


def _is_taken(target: Store) -> bool:
    if isinstance(target, FolderStore):
        return target.root.exists() and (not target.root.is_dir() or any(target.root.iterdir()))
    return bool(target.list())
