"""Which checkpoints of a window are damaged, by their losses."""

import numpy as np
from numpy.typing import NDArray

from ckptfuse.rules.observation import Vector

#: Nats; losses within this of the median are never outliers, however tight the others lie.
SLACK = 0.1


def healthy(losses: Vector) -> NDArray[np.bool_]:
    """At most 6 robust standard deviations (1.4826 MAD) above the median; never fewer than 2."""
    median = float(np.median(losses))
    spread = 1.4826 * float(np.median(np.abs(losses - median)))
    return losses <= median + max(6 * spread, SLACK)
