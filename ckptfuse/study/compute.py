"""Training that a merge stands for, and what scoring and merging cost, in FLOPs and in steps.

A step of training costs 6 N per token for N parameters, a forward pass 2 N per token (Kaplan et
al., arXiv 2001.08361), a merge 2 N per input: one product and one sum an element. All parameters
count, those of experts that a token does not pass through too; that leaves ratios as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptfuse.curves import first_reached

#: A loss over training: (step, loss), by step.
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large things are. ``scored``: predicted tokens of target text by split."""

    parameters: int
    tokens_per_step: float | None
    scored: Mapping[str, int]

    @property
    def step_flops(self) -> float | None:
        """FLOPs of one step of training, where its tokens are known."""
        if self.tokens_per_step is None:
            return None
        return 6.0 * self.parameters * self.tokens_per_step

    def fusion_flops(self, *, members: int, evaluations: int) -> float:
        """FLOPs of one fusion: its members scored, merges measured, the result made and scored.

        Every member is charged, though a window that slides scores only the newest; members and
        result are scored on every split, evaluations on selection.
        """
        everything = sum(self.scored.values())
        tokens = (members + 1) * everything + evaluations * self.scored.get("selection", 0)
        merges = (evaluations + 1) * members
        return 2.0 * self.parameters * (tokens + merges)


@dataclass(frozen=True, slots=True)
class Saving:
    """Steps of training that reach the same loss.

    ``at_least``: the curve ended above it, so the saving is more than it shows. ``cost``: FLOPs of
    the fusion in steps of training; None where the tokens of a step are not known.
    """

    steps: float
    at_least: bool
    cost: float | None

    @property
    def net(self) -> float | None:
        return None if self.cost is None else self.steps - self.cost


def saving(curve: Curve, start: float, loss: float, *, cost: float | None = None) -> Saving:
    """How many steps after ``start`` a curve first reaches a loss, linear between its points.

    Nothing where the curve is there already at ``start``; where it never gets there, all that is
    left of it, marked as such.
    """
    later = [(step, value) for step, value in curve if step >= start]
    reached = first_reached(later, loss)
    end = later[-1][0] if later else start
    steps = (end if reached is None else reached) - start
    return Saving(steps, reached is None, cost)


def with_branch(curve: Curve, branch: Curve) -> Curve:
    """A decay branch from where it leaves its run: the last step of the run before the branch's."""
    earlier = [point for point in curve if point[0] < branch[0][0]]
    return [*earlier[-1:], *branch]


def recovered(branch: Curve, loss: float) -> float | None:
    """The part of a decay's whole gain that a loss stands for; None if the decay gained nothing."""
    gained = branch[0][1] - branch[-1][1]
    return (branch[0][1] - loss) / gained if gained > 0 else None
