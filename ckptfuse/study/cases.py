"""What a study holds. Losses are of audit text, which no rule has seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ckptfuse.losses import Estimate, Losses, combine
from ckptfuse.params import Domain
from ckptfuse.study.compute import Scale

#: The two views on a loss: text of the training distribution, which sets weights, and other text.
IN, OUT = "in_distribution", "out_of_distribution"
#: View -> weight of each domain in it.
Views = Mapping[str, Mapping[str, float]]

#: What every merge is compared with: the window's newest checkpoint, the one that is best on
#: selection text, and the merge with equal weights.
Reference = Literal["newest", "best", "uniform"]
REFERENCES: tuple[Reference, ...] = ("newest", "best", "uniform")

#: How a window is: `damaged` holds a spike, `drifting` falls by more than DRIFT nats from its
#: oldest to its newest checkpoint (by the median of slopes, on selection), `steady` is neither.
Kind = Literal["steady", "drifting", "damaged"]
KINDS: tuple[Kind, ...] = ("steady", "drifting", "damaged")
DRIFT = 0.05


def views_of(domains: Mapping[str, Domain]) -> Views:
    """The target; and, where there are such, the domains of weight 0 in equal parts."""
    target = {name: domain.weight for name, domain in domains.items()}
    outside = {name: 0.0 if weight else 1.0 for name, weight in target.items()}
    return {IN: target, OUT: outside} if any(outside.values()) else {IN: target}


@dataclass(frozen=True, eq=False)
class Case:
    """What one rule made of one window.

    ``evaluations``: merges that it had measured on selection text, beside the one of its weights.
    """

    rule: str
    weights: tuple[float, ...]
    evaluations: int
    no_gain: str | None
    losses: Losses

    @property
    def merged(self) -> int:
        """Checkpoints in the merge."""
        return sum(1 for weight in self.weights if weight)


@dataclass(frozen=True, eq=False)
class Place:
    """One window, oldest checkpoint first. ``spikes``: steps of members that left the trend."""

    steps: tuple[int, ...]
    spikes: tuple[int, ...]
    fall: float
    references: Mapping[Reference, Losses]
    cases: tuple[Case, ...]

    @property
    def size(self) -> int:
        return len(self.steps)

    @property
    def step(self) -> int:
        return self.steps[-1]

    @property
    def kind(self) -> Kind:
        if self.spikes:
            return "damaged"
        return "drifting" if self.fall > DRIFT else "steady"

    def case(self, rule: str) -> Case:
        return next(case for case in self.cases if case.rule == rule)

    def gain(self, case: Case, over: Reference, view: Mapping[str, float]) -> Estimate:
        """How much lower the loss is, paired, in nats."""
        return combine(self.references[over].minus(case.losses), view)

    def regret(self, case: Case, view: Mapping[str, float]) -> float:
        """How far the loss is above that of the best rule of the study in this window."""
        lowest = min(other.losses.target(view).mean for other in self.cases)
        return case.losses.target(view).mean - lowest


@dataclass(frozen=True, slots=True)
class Point:
    """A single checkpoint of the trajectory: its loss in each view."""

    step: int
    losses: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Study:
    """One trajectory; ``branch`` is its decay branch, empty where none was given."""

    name: str
    views: Views
    curve: tuple[Point, ...]
    branch: tuple[Point, ...]
    places: tuple[Place, ...]
    scale: Scale

    @property
    def rules(self) -> tuple[str, ...]:
        return tuple(case.rule for case in self.places[0].cases)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({place.size for place in self.places}))

    def of_size(self, size: int) -> list[Place]:
        return [place for place in self.places if place.size == size]

    def of_kind(self, kind: Kind) -> list[Place]:
        return [place for place in self.places if place.kind == kind]

    def counted(self, view: str) -> list[str]:
        """The domains that count in a view."""
        return [name for name, weight in self.views[view].items() if weight]


def fall_over(steps: Sequence[int], losses: Sequence[float]) -> float:
    """By how much a loss falls from the first step to the last: the median slope, in nats."""
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    older, newer = np.triu_indices(len(x), k=1)
    slope = np.median((y[newer] - y[older]) / np.maximum(x[newer] - x[older], 1))
    return float(-slope * (x[-1] - x[0]))


def mean_losses(several: Sequence[Losses]) -> Losses:
    """Losses that are, block by block, the mean of several models' on the same blocks.

    The difference of two such means has the mean of the differences, and its standard error is
    that of the text: documents as clusters, whatever the models have in common.
    """
    first = several[0]
    for other in several:
        first.minus(other)  # raises RecordError where blocks differ
    return replace(first, nll=np.mean([losses.nll for losses in several], axis=0))
