"""A loss over training: where it first comes down to a level."""

from collections.abc import Iterable


def first_reached(curve: Iterable[tuple[float, float]], level: float) -> float | None:
    """The step at which a curve of (step, loss), by step, is first at ``level`` or below.

    Linear between the two points around the crossing; None if the curve stays above.
    """
    before: tuple[float, float] | None = None
    for step, loss in curve:
        if loss <= level:
            if before is None:
                return step
            share = (before[1] - level) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None
