"""Decoder layers through torch.compile, where that takes less time than it saves.

Between a layer's matrix products stand norms, rotations, activations and sums, each of them a
kernel or several that read and write their operands; compiled they become a few. What is compiled
is the layer and not the model: all layers of a model share it, and the job's next models do too.
It is compiled for batches of one shape, and all others are scored as before.

Compiled layers round otherwise, by about 1e-6 of a loss. Whether they are used depends on the size
of the model and on the blocks alone, so all checkpoints of a run are scored in the same way.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

_DEVICE = "cuda"
_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "torch", "TRITON_CACHE_DIR": "triton"}

#: Losses of a batch of tokens, [B, n] -> [B], all but the first ``context`` of each row.
Losses = Callable[[torch.Tensor, int], torch.Tensor]

#: Operations in batches of one shape from which on compiling pays: 5 s of an H200, of which it
#: saves 1 s. It takes 10 s once and, as its results are kept, less than 1 s in each later job.
ENOUGH = 2e15
#: What the losses of a block may change by.
_TOLERANCE = {torch.bfloat16: 5e-3}
_TOLERANCE_FLOAT32 = 1e-4


def keep_in(folder: Path) -> None:
    """Let this process find there what was compiled before, and leave what it compiles.

    Unless the environment says where; the default is a folder that a container loses.
    """
    for variable, name in _FOLDERS.items():
        os.environ.setdefault(variable, str(folder.absolute() / name))


def compiled_where_it_pays(
    losses: Losses,
    model: torch.nn.Module,
    shape: tuple[int, int],
    tokens: int,
    notice: Callable[[str], None],
) -> Losses:
    """The same losses, with compiled layers for batches of ``shape``, which hold ``tokens`` in all.

    ``notice`` is told if that is tried in vain.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = _layers_of(model) if 2 * parameters * tokens >= ENOUGH else []
    return _CompiledLosses(losses, layers, shape, notice) if layers else losses


def _layers_of(model: Any) -> Sequence[torch.nn.Module]:
    """The decoder layers, if they can be compiled: on a GPU, of transformers' own code.

    A recurrent layer may loop over the text's tokens, which a compiler would write out one by one,
    and what a model's own code does is unknown. Layers spread over several GPUs move what they
    compute between them.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # all of theirs are some

    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    known = all(type(layer).__module__.startswith("transformers.") for layer in layers)
    devices = {parameter.device for parameter in model.parameters()}
    recurrent = getattr(model, "_is_stateful", False)
    on_one = len(devices) == 1 and devices.pop().type == _DEVICE
    return layers if on_one and known and not recurrent else []


class _CompiledLosses:
    """Losses of a model whose layers are compiled for batches of ``shape``.

    The first such batch is checked against the layers as they are. Where that fails, or compiling
    does, ``notice`` is told and all goes on without.
    """

    def __init__(
        self,
        losses: Losses,
        layers: Sequence[torch.nn.Module],
        shape: tuple[int, int],
        notice: Callable[[str], None],
    ) -> None:
        self._losses = losses
        self._layers = layers
        self._shape: tuple[int, int] | None = shape
        self._notice = notice
        self._is_checked = False

    def __call__(self, tokens: torch.Tensor, context: int) -> torch.Tensor:
        if tuple(tokens.shape) != self._shape:
            return self._losses(tokens, context)
        try:
            with _compiled(self._layers):
                found = self._losses(tokens, context)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may fail in any way
            first_line = str(error).strip().partition("\n")[0]
            return self._without(f"{type(error).__name__}: {first_line}", tokens, context)
        if not self._is_checked:
            (plain,), first = self._losses(tokens[:1], context), found[0]
            if not torch.isclose(first, plain, rtol=self._tolerance(), atol=0, equal_nan=True):
                reason = f"it gives {first:.6f} nats for a block of {plain:.6f}"
                return self._without(reason, tokens, context)
            self._is_checked = True
        return found

    def _tolerance(self) -> float:
        dtype = next(self._layers[0].parameters()).dtype
        return _TOLERANCE.get(dtype, _TOLERANCE_FLOAT32)

    def _without(self, reason: str, tokens: torch.Tensor, context: int) -> torch.Tensor:
        self._shape = None
        self._notice(f"going on without torch.compile: {reason}")
        return self._losses(tokens, context)


@contextmanager
def _compiled(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within, these layers are compiled."""
    forward = _compiled_forward()
    for layer in layers:
        layer.forward = partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@cache
def _compiled_forward() -> Callable[..., Any]:
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        # Kernels that are chosen by timing them would round otherwise from one job to the next.
        "deterministic": True,
        # More would be a process for each core, on a machine that may be training.
        "compile_threads": 1,
    }
    return torch.compile(_forward, dynamic=False, options=options)


def _forward(layer: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
    return type(layer).forward(layer, *arguments, **named)
