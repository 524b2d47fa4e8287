"""Weights found by gradient descent on the merged model's own loss: what no formula can beat.

The loss of sum_i w_i theta_i on selection text, and its gradient in w, go to SLSQP on the simplex,
from equal weights. The model of the losses that `calibrated` rests on has no part in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ckptfuse import blocks as blocks_module
from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.modeling import build_model
from ckptfuse.protocol import BlockSet, Numerics
from ckptfuse.reading import load

Vector = NDArray[np.float64]
ROWS = 16  # blocks of one forward and backward pass
NEGLIGIBLE = 1e-4  # weight that is none


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best weights met, and how many passes forward and backward it took."""

    weights: tuple[float, ...]
    passes: int


def optimise(
    uris: Sequence[str], item: BlockSet, domain: str, numerics: Numerics, *, iterations: int = 25
) -> Optimum:
    """Minimise the loss of one domain over the simplex of these checkpoints."""
    objective = _Objective(uris, item, domain, numerics)
    count = len(uris)
    minimize(
        objective,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"maxiter": iterations, "ftol": 1e-6},
    )
    weights = np.where(objective.best < NEGLIGIBLE, 0.0, objective.best)
    return Optimum(tuple((weights / weights.sum()).tolist()), objective.passes)


class _Objective:
    """w -> loss and gradient. Keeps the best point that it was asked for."""

    def __init__(
        self, uris: Sequence[str], item: BlockSet, domain: str, numerics: Numerics
    ) -> None:
        models = [_model(uri, numerics) for uri in uris]
        self._model = models[0]
        named = [dict(model.named_parameters()) for model in models]
        self._stacks = {
            name: torch.stack([parameters[name].detach() for parameters in named])
            for name in named[0]
        }
        self._batches = _batches(item, domain)
        self.passes = 0
        self.best, self._lowest = np.empty(0), np.inf

    def __call__(self, point: Vector) -> tuple[float, Vector]:
        weights = torch.tensor(point, dtype=torch.float32, requires_grad=True)
        total, tokens = 0.0, 0
        for rows in self._batches:
            merged: Mapping[str, torch.Tensor] = {
                name: torch.tensordot(weights, stack, dims=1)
                for name, stack in self._stacks.items()
            }
            inputs = {"input_ids": rows[:, :-1], "use_cache": False}
            logits = functional_call(self._model, dict(merged), (), inputs).logits
            loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            total, tokens = total + loss.item(), tokens + rows[:, 1:].numel()
        assert weights.grad is not None
        self.passes += 1
        value = total / tokens
        if value < self._lowest and point.min() > -1e-6:
            self.best, self._lowest = point.copy(), value
        return value, weights.grad.numpy().astype(np.float64) / tokens


def _model(uri: str, numerics: Numerics) -> torch.nn.Module:
    loaded = load(open_checkpoint(uri))
    return build_model(loaded.layout.config, loaded.state_dict, numerics=numerics, where=uri)


def _batches(item: BlockSet, domain: str) -> list[torch.Tensor]:
    """The domain's blocks of full length, [ROWS, L] each; what is shorter is left out."""
    blocks = blocks_module.load(item.folder)
    chosen = np.flatnonzero(blocks.domain == blocks.domains.index(domain))
    longest = int(blocks.lengths[chosen].max())
    rows = [blocks.block(int(i)) for i in chosen if blocks.lengths[i] == longest]
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    return [tokens[start : start + ROWS] for start in range(0, len(tokens), ROWS)]
