"""Has the trainer fallen silent? From the times at which its checkpoints were written."""

import itertools
import statistics
from collections.abc import Collection, Iterable

#: Checkpoints whose spacing is what is usual.
RECENT = 10
#: So many times the usual is too long; checkpoints come with some jitter, evaluations, restarts.
PATIENCE = 3.0


def usual_interval(times: Iterable[float]) -> float | None:
    """Median seconds between the last checkpoints; None before the third."""
    recent = sorted(times)[-RECENT - 1 :]
    if len(recent) < 3:
        return None
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(recent))


def silence(written: Collection[float], now: float) -> tuple[float, float] | None:
    """Seconds since the newest checkpoint and those that are usual between two, if that is long.

    ``written``: when each was, in seconds since the epoch, as ``now``.

    None while the trainer is within ``PATIENCE`` times the usual, or too few are known to tell.
    """
    usual = usual_interval(written)
    if not usual:
        return None
    quiet = now - max(written)
    return (quiet, usual) if quiet > PATIENCE * usual else None
