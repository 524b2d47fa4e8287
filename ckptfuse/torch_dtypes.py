"""The dtypes of safetensors as torch has them."""

import torch

from ckptfuse.checkpoints import Checkpoint
from ckptfuse.errors import DamagedCheckpoint
from ckptfuse.formats.tensors import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def torch_dtype(tensor: Tensor, checkpoint: Checkpoint) -> torch.dtype:
    if tensor.dtype not in DTYPES:
        raise DamagedCheckpoint(
            f"{checkpoint.uri}: tensor {tensor.name!r} is stored as {tensor.dtype}, which is not "
            f"supported; {', '.join(DTYPES)} are"
        )
    return DTYPES[tensor.dtype]
