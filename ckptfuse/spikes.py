"""Spikes: checkpoints whose loss leaves the trajectory's trend, as far as it was known then.

A pure function of the losses so far, so a mark never changes as training goes on. The trend is a
line through the last eight checkpoints (Theil and Sen: the median of all slopes), but never below
the median of the last three, since losses fall ever more slowly: a curve that flattens is no
spike. A loss is one when it is above that by more than six robust standard deviations (1.4826 MAD)
of the last eight around their line, and by at least 0.05 nats. Spikes stay in the history: where
the loss remains high, the medians follow within a few checkpoints, and it is the new trend.

Marks are for people. Windows keep spikes: `calibrated` gives them no weight and leaves them out of
its noise estimate, and whatever a rule makes of them the gate has to pass.
"""

from collections.abc import Sequence

import numpy as np

HISTORY = 8
FEWEST = 4
LEAST = 0.05  # nats
DEVIATIONS = 6.0


def excess_over_trend(steps: Sequence[int], losses: Sequence[float]) -> float | None:
    """How far the last of these losses is above the trend of those before it, in nats.

    In the order of training. None if it is no spike, or fewer than four are before it.
    """
    x = np.asarray(steps[-HISTORY - 1 : -1], dtype=np.float64)
    y = np.asarray(losses[-HISTORY - 1 : -1], dtype=np.float64)
    if len(y) < FEWEST:
        return None
    older, newer = np.triu_indices(len(x), k=1)
    slope = np.median((y[newer] - y[older]) / np.maximum(x[newer] - x[older], 1))
    residuals = y - slope * x
    level = np.median(residuals)
    expected = max(float(level + slope * steps[-1]), float(np.median(y[-3:])))
    spread = 1.4826 * float(np.median(np.abs(residuals - level)))
    excess = losses[-1] - expected
    return float(excess) if excess > max(DEVIATIONS * spread, LEAST) else None
