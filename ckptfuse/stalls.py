"""Has the trainer fallen silent? From the times at which its checkpoints were written."""

import itertools
import statistics
from collections.abc import Iterable

from ckptfuse.records import CheckpointRecord

#: Checkpoints whose spacing is what is usual.
RECENT = 10
#: So many times the usual is too long; checkpoints come with some jitter, evaluations, restarts.
PATIENCE = 3.0


def silence(known: Iterable[CheckpointRecord], now: float) -> tuple[float, float] | None:
    """Seconds since the newest checkpoint and those that are usual between two, if that is long.

    None while the trainer is within ``PATIENCE`` times the usual, or too few are known to tell.
    """
    written = sorted(record.modified for record in known)[-RECENT - 1 :]
    if len(written) < 3:
        return None
    usual = statistics.median(b - a for a, b in itertools.pairwise(written))
    quiet = now - written[-1]
    return (quiet, usual) if usual > 0 and quiet > PATIENCE * usual else None
