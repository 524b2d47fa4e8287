"""A merge as a state dict in memory or on a device, without touching disk."""

from collections.abc import Sequence

import torch

from ckptfuse.merge.arithmetic import BLOCK_ELEMENTS
from ckptfuse.merge.inputs import Inputs
from ckptfuse.merge.output_files import OutputFile
from ckptfuse.merge.passes import Pass
from ckptfuse.torch_dtypes import DTYPES, torch_dtype


def merge_to_memory(
    inputs: Inputs,
    weights: Sequence[float],
    *,
    device: str = "cpu",
    block_elements: int = BLOCK_ELEMENTS,
) -> dict[str, torch.Tensor]:
    """The merge as a state dict; equal to what a folder would hold.

    Tensors are views of one buffer per file: the peak is the size of one model.
    """
    for tensor in inputs.ancillary.tensors.values():
        torch_dtype(tensor, inputs.ancillary.checkpoint)  # or says that torch has none
    state_dict: dict[str, torch.Tensor] = {}
    with Pass(inputs, [weights], block_elements=block_elements) as merging:
        for file in merging.files:
            buffer = torch.empty(file.size, dtype=torch.uint8, device=device)
            merging.merge_file(file, [_Buffer(buffer)])
            state_dict |= _views(file, buffer, inputs)
    return state_dict


class _Buffer:
    """Memory that is written by parts."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer

    def write_at(self, start: int, data: memoryview) -> None:
        self._buffer[start : start + len(data)] = torch.frombuffer(data, dtype=torch.uint8)


def _views(file: OutputFile, buffer: torch.Tensor, inputs: Inputs) -> dict[str, torch.Tensor]:
    views = {}
    for placed in file.placed:
        flat = buffer[placed.start : placed.start + placed.length]
        if placed.start % placed.width:  # legal in the format, and torch wants alignment
            flat = flat.clone()
        views[placed.tensor.name] = flat.view(DTYPES[placed.dtype]).reshape(placed.box.shape)
    return views
