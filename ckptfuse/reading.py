"""Read a whole checkpoint into memory once: tensors, content hashes and a check for NaN and Inf.

    file bytes --8 MiB leaves, several threads--> one buffer per file --views--> tensors
                         |                                               |
                      SHA-256 tree                               finite, or named

Tensors are views of the file's buffer: the peak is the checkpoint's size, not twice that.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ckptfuse import checkpoints, digests
from ckptfuse.checkpoints import Checkpoint
from ckptfuse.errors import NonFiniteValues
from ckptfuse.fingerprints import READ_THREADS, check_unchanged, contents_of
from ckptfuse.formats.tensors import Tensor
from ckptfuse.layouts import Layout, read_layout
from ckptfuse.merge.inputs import Inputs
from ckptfuse.merge.memory import merge_to_memory
from ckptfuse.store import Entry, Store
from ckptfuse.torch_dtypes import torch_dtype


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint in memory. ``contents`` maps path -> (size, content hash)."""

    layout: Layout
    state_dict: dict[str, torch.Tensor]
    contents: Mapping[str, tuple[int, str]]

    @property
    def fingerprint(self) -> str:
        return checkpoints.fingerprint(self.contents)


def load(checkpoint: Checkpoint) -> Loaded:
    """Read every file of a checkpoint once.

    Raises NonFiniteValues naming the tensor, DamagedCheckpoint for a dtype that torch cannot hold,
    ChangedCheckpoint when a file was written again meanwhile.
    """
    layout = read_layout(checkpoint)
    if layout.format == "dcp":
        return _load_distributed(layout)
    store = checkpoint.store()
    contents: dict[str, tuple[int, str]] = {}
    state_dict: dict[str, torch.Tensor] = {}
    by_file: dict[str, list[Tensor]] = {}
    for tensor in layout.tensors.values():
        by_file.setdefault(tensor.pieces[0].file, []).append(tensor)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for entry in checkpoint.files:
            buffer, content = _read_file(store, entry, pool)
            contents[entry.path] = (entry.size, content)
            for tensor in by_file.get(entry.path, []):
                state_dict[tensor.name] = _view(buffer, tensor, checkpoint)
    check_unchanged(checkpoint)
    copied = Inputs((layout,), layout).copied  # their NaN and Inf are as harmless as in a merge
    for name, values in state_dict.items():
        if name not in copied:
            check_finite(values, name=name, checkpoint=checkpoint)
    return Loaded(layout, state_dict, contents)


def _load_distributed(layout: Layout) -> Loaded:
    """The model's tensors, put together from their pieces; the files are hashed in a read before.

    They hold the optimizer too, which need not come into memory.
    """
    checkpoint = layout.checkpoint
    contents = contents_of(checkpoint)
    state_dict = merge_to_memory(Inputs((layout,), layout), [1.0])
    return Loaded(layout, state_dict, contents)


def check_finite(values: torch.Tensor, *, name: str, checkpoint: Checkpoint) -> None:
    """Raise NonFiniteValues if a floating tensor holds NaN or Inf."""
    if values.is_floating_point() and not _is_finite(values):
        bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteValues(
            f"{checkpoint.uri}: tensor {name!r} has {bad} NaN or Inf values of {values.numel()}",
            checkpoint=checkpoint.name,
        )


def _is_finite(values: torch.Tensor) -> bool:
    """The least and the largest tell of Inf, and are NaN where any is; no new tensor is made."""
    return not values.numel() or all(
        bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values)
    )


def _read_file(
    store: Store, entry: Entry, pool: ThreadPoolExecutor
) -> tuple[NDArray[np.uint8], str]:
    buffer = np.empty(entry.size, np.uint8)  # a bytearray's zeros would be written, by one thread
    view = buffer.data

    with store.reader(entry.path) as reader:

        def read_leaf(start: int) -> bytes:
            leaf = view[start : min(start + digests.LEAF_SIZE, entry.size)]
            reader.read_into(start, leaf)
            return digests.leaf_digest(leaf)

        leaves = pool.map(read_leaf, range(0, entry.size, digests.LEAF_SIZE))
        return buffer, digests.tree_digest(leaves)


def _view(buffer: NDArray[np.uint8], tensor: Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    dtype = torch_dtype(tensor, checkpoint)
    if tensor.length == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    (piece,) = tensor.pieces
    count = tensor.length // dtype.itemsize
    if piece.start % dtype.itemsize:  # a header of odd length: legal, and torch wants alignment
        data = buffer[piece.start : piece.start + tensor.length].copy()
        return torch.frombuffer(data, dtype=dtype, count=count).reshape(tensor.shape)
    values = torch.frombuffer(buffer, dtype=dtype, count=count, offset=piece.start)
    return values.reshape(tensor.shape)
