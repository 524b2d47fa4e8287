"""``.metadata`` of a distributed checkpoint that holds part of another's items, at other places.

Written with torch's own classes, which a pickle names, so it imports torch. Its bytes are those of
the torch version that wrote them; the weights' never are.
"""

import pickle
from collections.abc import Iterable, Mapping

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckptfuse.formats.dcp import Entry
from ckptfuse.formats.torch_zip import TORCH_DTYPES

_DTYPES = {ours: getattr(torch, name) for name, ours in TORCH_DTYPES.items()}


def encode_metadata(entries: Iterable[Entry], starts: Mapping[tuple[str, int], int]) -> bytes:
    """The pickle for these entries; ``starts`` maps (file, former start) of an item to its new."""
    about: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for entry in entries:
        paths[entry.name] = entry.path
        chunks = [
            ChunkStorageMetadata(torch.Size(item.box.offsets), torch.Size(item.box.shape))
            for item in entry.items
            if item.box is not None
        ]
        about[entry.name] = (
            BytesStorageMetadata()
            if entry.dtype is None
            else TensorStorageMetadata(
                TensorProperties(_DTYPES[entry.dtype]), torch.Size(entry.shape), chunks
            )
        )
        for number, item in enumerate(entry.items):
            offset = None if item.box is None else torch.Size(item.box.offsets)
            index = MetadataIndex(entry.name, offset, None if offset is None else number)
            name = item.file.rpartition("/")[2]
            storage[index] = _StorageInfo(name, starts[item.file, item.start], item.length)
    return pickle.dumps(Metadata(about, paths, storage))
