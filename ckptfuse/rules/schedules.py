"""Rules that look at the position in the window alone: free, and blind to quality."""

from typing import Annotated

import numpy as np
from pydantic import Field

from ckptfuse.rules.observation import Observation, Weights
from ckptfuse.rules.registry import rule
from ckptfuse.rules.simplex import as_weights, corner, fading, normalised


@rule("latest")
def latest(seen: Observation) -> Weights:
    """All weight on the newest checkpoint: w_K = 1. A baseline."""
    return Weights(as_weights(corner(len(seen), -1)))


@rule("uniform")
def uniform(seen: Observation) -> Weights:
    """w_i = 1/K. LAWA (arXiv 2209.14981, 2306.03241), PMA's SMA (arXiv 2505.12082)."""
    return Weights(as_weights(np.full(len(seen), 1 / len(seen))))


@rule("linear")
def linear(seen: Observation) -> Weights:
    """w_i proportional to i = 1..K, oldest first. PMA's WMA (arXiv 2505.12082)."""
    return Weights(as_weights(normalised(np.arange(1.0, len(seen) + 1))))


@rule("ema")
def ema(seen: Observation, *, alpha: Annotated[float, Field(gt=0, le=1)] = 0.2) -> Weights:
    """w_i proportional to (1 - alpha)^(K - i): an exponential moving average. PMA (2505.12082).

    Normalised over the window. The literal recursion m = alpha * new + (1 - alpha) * m, begun at
    the oldest checkpoint, would leave (1 - alpha)^(K-1) on that one.
    """
    return Weights(as_weights(normalised(fading(len(seen), alpha))))


@rule("minus-sqrt")
def minus_sqrt(seen: Observation) -> Weights:
    """w_i = (sqrt(i) - sqrt(i - 1)) / sqrt(K), i = 1..K: the merge that stands for a 1-sqrt decay.

    WSM (arXiv 2507.17634): with learning rates v_j = 1 - sqrt(j / K) after checkpoint j = 1..K-1,
    the oldest being checkpoint 0, it gets 1 - v_1, checkpoint j gets v_j - v_(j+1), and the newest
    v_(K-1); that is the formula above. Most weight is on the oldest: 0.316 of K = 10.
    """
    roots = np.sqrt(np.arange(len(seen) + 1) / len(seen))
    return Weights(as_weights(np.diff(roots).tolist()))
