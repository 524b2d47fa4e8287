"""What lies in a merged folder beside its weights: configuration, tokenizer, index, provenance."""

import json

from ckptfuse.checkpoints import CONFIG, INDEX, METADATA, Contents, is_ancillary
from ckptfuse.digests import content_digest
from ckptfuse.errors import ConfigurationError
from ckptfuse.fingerprints import check_unchanged, copy_file
from ckptfuse.fusion import FusionSpec
from ckptfuse.layouts import is_optimizer
from ckptfuse.merge.inputs import Inputs
from ckptfuse.merge.output_files import output_files, weight_index
from ckptfuse.store import Store

PROVENANCE = "fusion.json"
CARD = "README.md"


def write_companions(
    inputs: Inputs, spec: FusionSpec, target: Store, weights: Contents
) -> Contents:
    """All that is no weights; ``fusion.json`` names every other file, and its hash.

    Raises ChangedCheckpoint if what it is taken from was written again since it was listed.
    """
    if inputs.recipe.form == "dcp":
        contents = weights | _copy_rest(inputs, target)
        small = _metadata(inputs)
    else:
        contents = dict(weights)
        small = _ancillary_files(inputs)
    check_unchanged(inputs.ancillary.checkpoint)
    return write_small(small, spec, target, contents)


def write_small(
    small: dict[str, bytes], spec: FusionSpec, target: Store, contents: Contents
) -> Contents:
    """Small files, the model card, and ``fusion.json``, which names these and ``contents``."""
    small[CARD] = spec.model_card()
    contents |= {path: (len(data), content_digest(data)) for path, data in small.items()}
    small[PROVENANCE] = spec.provenance(contents)
    contents[PROVENANCE] = (len(small[PROVENANCE]), content_digest(small[PROVENANCE]))
    for path in sorted(small, key=lambda path: (_comes_last(path), path)):
        target.write(path, small[path])
    return contents


def _comes_last(path: str) -> bool:
    return path == CONFIG or path.rpartition("/")[2] == METADATA


def _ancillary_files(inputs: Inputs) -> dict[str, bytes]:
    """Configuration, tokenizer and index of a Hugging Face folder."""
    newest = inputs.ancillary.checkpoint
    source = newest.store()
    wanted = (e.path for e in newest.files if is_ancillary(e.path) or e.path == INDEX)
    small = {path: source.read(path) for path in wanted}
    if CONFIG not in small:
        raise ConfigurationError(
            f"{newest.uri} has no {CONFIG}, which a Hugging Face folder needs; put the model's "
            "configuration there, or keep the form of the inputs (--form dcp)"
        )
    if inputs.recipe.dtype is not None:
        small[CONFIG] = with_dtype(small[CONFIG], inputs.recipe.dtype)
    if INDEX not in small or inputs.recipe.dtype is not None:
        index = weight_index(output_files(inputs))
        if index is not None:
            small[INDEX] = index
    return small


def with_dtype(config: bytes, dtype: str) -> bytes:
    """A config.json that says this dtype of its weights."""
    values = json.loads(config)
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    return (json.dumps({**values, key: dtype}, indent=2, sort_keys=True) + "\n").encode()


def _copy_rest(inputs: Inputs, target: Store) -> Contents:
    """Whatever else lies beside a distributed checkpoint: a resume may need it."""
    newest = inputs.ancillary.checkpoint
    source = newest.store()
    taken = set(inputs.ancillary.item_files)
    contents: Contents = {}
    for entry in newest.files:
        name = entry.path.rpartition("/")[2]
        left_out = inputs.recipe.optimizer == "none" and (
            entry.path.startswith("optim") or name.endswith(".distcp")
        )
        ours = name in (PROVENANCE, CARD)  # of an earlier merge that this one draws from
        if not (entry.path in taken or _comes_last(entry.path) or left_out or ours):
            contents[entry.path] = copy_file(source, target, entry)
    return contents


def _metadata(inputs: Inputs) -> dict[str, bytes]:
    """The newest's .metadata as it is, or for the items that are left; and its config.json."""
    newest = inputs.ancillary.checkpoint
    source = newest.store()
    last = [entry.path for entry in newest.files if _comes_last(entry.path)]
    small = {path: source.read(path) for path in last}
    if inputs.recipe.optimizer != "none":
        return small
    from ckptfuse.formats.dcp_metadata import encode_metadata

    kept = [entry for entry in inputs.ancillary.entries.values() if not is_optimizer(entry)]
    starts = {
        (segment.file, segment.file_start): segment.start
        for file in output_files(inputs)
        for segment in file.segments
    }
    mine = [p for p in last if p.rpartition("/")[2] == METADATA and not p.startswith("optim")]
    dropped = [p for p in last if p.startswith("optim")]
    small |= dict.fromkeys(mine, encode_metadata(kept, starts))
    return {path: data for path, data in small.items() if path not in dropped}
