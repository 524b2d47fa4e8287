"""A merge of a trainer's own layout as a Hugging Face folder.

A converter may cut and join tensors as it likes, so this is not streamed: the merge is made whole
in memory, and what the converter makes of it beside it.
"""

import os
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import contiguous_format

from ckptfuse.checkpoints import CONFIG, Contents, read_ancillary
from ckptfuse.conversion import convert
from ckptfuse.digests import LEAF_SIZE, TreeHasher
from ckptfuse.fusion import FusionSpec
from ckptfuse.merge.companions import with_dtype, write_small
from ckptfuse.merge.folder import appear, unfinished_folder
from ckptfuse.merge.inputs import Inputs
from ckptfuse.merge.memory import merge_to_memory
from ckptfuse.store import FolderStore, open_store, remove_folder


def write_converted(
    inputs: Inputs, spec: FusionSpec, folder: Path, *, converter: str | None, model: str
) -> Contents:
    """Write the folder of a merge, converted; it appears when it is whole.

    ``model`` is the Hugging Face folder that has the configuration and tokenizer of what the
    ``converter`` (None: the tensors have transformers' names) makes. Returns path -> (size,
    content hash). Raises DamagedCheckpoint when the converter does not know the tensors.
    """
    where = f"fusion {spec.id[:16]}"
    _, tensors = convert(converter, model, merge_to_memory(inputs, spec.weights), where)
    place = FolderStore(unfinished_folder(folder, spec.id))
    remove_folder(place.root)
    place.root.mkdir(parents=True)
    # The file format knows no views, and the merged tensors are views of one buffer.
    whole = {
        name: values.clone(memory_format=contiguous_format) for name, values in tensors.items()
    }
    save_torch_state_dict(whole, place.root, max_shard_size="5GB")
    contents = {path.name: _settle(path) for path in sorted(place.root.iterdir())}
    small = read_ancillary(open_store(model))
    dtypes = [values.dtype for values in whole.values() if values.is_floating_point()]
    small[CONFIG] = with_dtype(small[CONFIG], str(dtypes[0]).removeprefix("torch."))
    contents = write_small(small, spec, place, contents)
    appear(place.root, folder)
    return contents


def _settle(path: Path) -> tuple[int, str]:
    """Size and content hash of a file that is on the disk then."""
    hasher = TreeHasher()
    with path.open("rb") as file:
        while data := file.read(LEAF_SIZE):
            hasher.update(data)
        os.fsync(file.fileno())
    return path.stat().st_size, hasher.hexdigest()
