"""Checkpoints that can be merged: every header read and compared before a byte of data."""

from collections.abc import Sequence
from dataclasses import dataclass

from ckptfuse.checkpoints import (
    VOLATILE_CONFIG,
    Checkpoint,
    Layout,
    config_identity,
    read_layout,
)
from ckptfuse.errors import ConfigurationError, MismatchedCheckpoints
from ckptfuse.formats.safetensors import Tensor
from ckptfuse.merge.arithmetic import DTYPES

COPIED = frozenset(["BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"])
_OUTPUT = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Inputs:
    """Checkpoints that were checked to fit each other, oldest first.

    ``ancillary`` gives configuration, tokenizer, sharding and the tensors that are copied; it may
    or may not be one of the layouts.
    """

    layouts: tuple[Layout, ...]
    ancillary: Layout
    dtype: str | None = None

    def output_dtype(self, tensor: Tensor) -> str:
        if tensor.dtype in DTYPES and self.dtype is not None:
            return _OUTPUT[self.dtype]
        return tensor.dtype


def open_inputs(
    checkpoints: Sequence[Checkpoint], ancillary: Checkpoint, dtype: str | None = None
) -> Inputs:
    """Read and compare every header before a byte of data.

    Raises MismatchedCheckpoints naming the tensor or configuration key that differs.
    """
    if not checkpoints:
        raise ConfigurationError("nothing to merge: no checkpoint was given")
    reference = read_layout(ancillary)
    layouts = tuple(read_layout(checkpoint) for checkpoint in checkpoints)
    for layout in layouts:
        _check_same(layout, reference)
    for tensor in reference.tensors.values():
        if tensor.dtype not in DTYPES.keys() | COPIED:
            raise MismatchedCheckpoints(
                f"{ancillary.uri}: tensor {tensor.name!r} is {tensor.dtype}, whose scales this "
                "merge does not know; convert the checkpoints to bfloat16 first"
            )
    return Inputs(layouts, reference, dtype)


def _check_same(layout: Layout, reference: Layout) -> None:
    here, there = layout.checkpoint.uri, reference.checkpoint.uri
    if layout.tensors.keys() != reference.tensors.keys():
        only_here = sorted(layout.tensors.keys() - reference.tensors.keys())
        only_there = sorted(reference.tensors.keys() - layout.tensors.keys())
        raise MismatchedCheckpoints(
            f"{here} and {there} hold different tensors: only the first has {only_here[:3]}, only "
            f"the second {only_there[:3]}; checkpoints of one trajectory are needed"
        )
    for name, tensor in layout.tensors.items():
        other = reference.tensors[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            raise MismatchedCheckpoints(
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)} in {here} and "
                f"{other.dtype} {list(other.shape)} in {there}; leave one of them out"
            )
    if config_identity(layout.config) != config_identity(reference.config):
        keys = layout.config.keys() | reference.config.keys()
        differing = sorted(
            key
            for key in keys - VOLATILE_CONFIG
            if layout.config.get(key) != reference.config.get(key)
        )
        raise MismatchedCheckpoints(
            f"config.json of {here} and {there} differ in {', '.join(differing)}; a merge across a "
            "change of the architecture or of the training setup is not a model"
        )
