"""Decoder layers through torch.compile, where that takes less time than it saves.

Between a layer's matrix products stand norms, rotations, activations and sums, each of them a
kernel or several that read and write their operands; compiled they become a few. What is compiled
is the layer and not the model: all layers of a model share it, and the job's next models do too.
It is compiled for batches of one shape, and all others are scored as before.

Compiled layers round otherwise (docs/scoring.md has by how much). Whether they are used depends on
the size of the model and on the blocks, so that all checkpoints of a run are scored in the same
way; where memory or a compiler was missing, the record says that they were not.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from ckptfuse.errors import in_a_line

_DEVICE = "cuda"
_OFF = "TORCH_COMPILE_DISABLE"
_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "torch", "TRITON_CACHE_DIR": "triton"}

#: Losses of a batch of tokens, [B, n] -> [B], all but the first ``context`` of each row.
Losses = Callable[[torch.Tensor, int], torch.Tensor]

#: Operations in batches of one shape from which on compiling pays: 5 s of an H200, of which it
#: saves 1 s. It takes 10 s once and, as its results are kept, less than 1 s in each later job.
ENOUGH = 2e15
#: What the first batch is checked with: so many rows, whose losses may change by a part of them and
#: by nats a predicted token.
_CHECKED_ROWS = 4
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4
#: Layers and shapes that this process found not to be compiled: each would take as long again.
_given_up: set[tuple[frozenset[type], tuple[int, int]]] = set()


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
) -> "CompiledLosses | None":
    """Faster ``losses`` for batches of ``shape``, which hold ``tokens`` in all; None if not so.

    ``notice`` is told if that is tried in vain.
    """
    if os.environ.get(_OFF) == "1":  # torch reads it when it is imported, and says nothing
        return None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = _layers_of(model) if 2 * parameters * tokens >= ENOUGH else []
    if not layers or _key(layers, shape) in _given_up:
        return None
    return CompiledLosses(losses, layers, shape, notice)


def _layers_of(model: Any) -> Sequence[torch.nn.Module]:
    """The decoder layers, if they can be compiled: on a GPU, of transformers' own code.

    A recurrent layer may loop over the text's tokens, which a compiler would write out one by one,
    and what a model's own code does is unknown. Layers spread over several GPUs move what they
    compute between them.
    """
    # transformers' decoder layers all derive from it, whatever a model calls them.
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    devices = {parameter.device for parameter in model.parameters()}
    on_one = len(devices) == 1 and devices.pop().type == _DEVICE
    recurrent = getattr(model, "_is_stateful", False)
    return layers if on_one and not recurrent and all(map(_is_known, layers)) else []


def _is_known(layer: torch.nn.Module) -> bool:
    """Whether transformers and torch wrote all of it, and nobody changed what it does."""
    written = {type(module).__module__.partition(".")[0] for module in layer.modules()}
    return written <= {"transformers", "torch"} and "forward" not in vars(layer)


def _key(
    layers: Sequence[torch.nn.Module], shape: tuple[int, int]
) -> tuple[frozenset[type], tuple[int, int]]:
    return frozenset(map(type, layers)), shape


class CompiledLosses:
    """Losses of a model whose layers are compiled for batches of ``shape``.

    The first such batch is checked against the layers as they are. Where that fails, or compiling
    does, ``notice`` is told, and this process goes on without.
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
        self._shape = shape
        self._notice = notice
        self.is_used = False

    def __call__(self, tokens: torch.Tensor, context: int) -> torch.Tensor:
        found = None
        if tuple(tokens.shape) == self._shape and _key(self._layers, self._shape) not in _given_up:
            found = self._try(tokens, context)
        return self._losses(tokens, context) if found is None else found

    def _try(self, tokens: torch.Tensor, context: int) -> torch.Tensor | None:
        try:
            with _compiled(self._layers):
                found = self._losses(tokens, context)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may fail in any way
            self._give_up(in_a_line(error))
            return None
        if not self.is_used:
            rows = tokens[:_CHECKED_ROWS]
            ours, plain = found[: len(rows)].sum(), self._losses(rows, context).sum()
            slack = _ABSOLUTE * rows[:, context:].numel()
            if not torch.isclose(ours, plain, rtol=_RELATIVE, atol=slack, equal_nan=True):
                self._give_up(f"it gives {ours:.6f} nats for text of {plain:.6f}")
                return None
        self.is_used = True
        return found

    def _give_up(self, reason: str) -> None:
        self.is_used = False
        _given_up.add(_key(self._layers, self._shape))
        self._notice(f"going on without torch.compile: {reason}")


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
    # In one graph or not at all: parts would be compiled for each number of tokens of an expert.
    return torch.compile(_forward, dynamic=False, fullgraph=True, options=options)


def _forward(layer: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
    return type(layer).forward(layer, *arguments, **named)
