"""Rules that look at the losses alone: free, once the checkpoints are scored."""

from typing import Annotated

import numpy as np
from pydantic import Field

from ckptfuse.rules.observation import Observation, Weights
from ckptfuse.rules.registry import rule
from ckptfuse.rules.simplex import as_weights, corner, softmax

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@rule("best")
def best(seen: Observation) -> Weights:
    """All weight on the lowest loss (the newest of equals). A baseline."""
    newest_first = int(np.argmin(seen.losses[::-1]))
    return Weights(as_weights(corner(len(seen), len(seen) - 1 - newest_first)))


@rule("inverse-perplexity")
def inverse_perplexity(seen: Observation, *, p: Positive = 1.0) -> Weights:
    """w_i proportional to perplexity_i^-p = exp(-p l_i): softmax with tau = 1/p.

    The plainest form of weighting by generation quality (Information Fusion 125, 2026, 103415).
    """
    return Weights(as_weights(softmax(seen.losses, 1 / p)))


@rule("softmax")
def softmax_of_losses(seen: Observation, *, tau: Positive = 0.1) -> Weights:
    """w_i proportional to exp(-l_i / tau), tau in nats. Soft relative of ``calibrated``."""
    return Weights(as_weights(softmax(seen.losses, tau)))
