"""A study in figures: for each rule, means over windows with their errors."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptfuse.losses import Estimate, combine
from ckptfuse.study.cases import IN, REFERENCES, Case, Place, Reference, Study, mean_losses
from ckptfuse.study.compute import Curve, Saving, recovered, saving, with_branch

#: Nats; losses that are closer than this are equal.
_SAME = 1e-9

#: Reference -> view -> mean gain over windows, with the error from sampling documents.
Gains = Mapping[Reference, Mapping[str, Estimate]]


@dataclass(frozen=True, slots=True)
class Savings:
    """Steps saved, of several windows. ``open_ended``: so many of them are lower bounds."""

    windows: int
    median: float
    median_net: float | None
    open_ended: int


@dataclass(frozen=True, slots=True)
class Summary:
    """One rule over some windows. ``wins``: where no rule is better; a tie is one for each."""

    rule: str
    windows: int
    losses: Mapping[str, float]  # by view
    gains: Gains
    wins: int
    worst_regret: float
    worse_than_newest: int
    evaluations: float
    declined: int  # windows where the rule expected no gain
    against_run: Savings
    against_branch: Savings | None
    of_decay: float | None  # median part of the decay's gain


def summarise(study: Study, places: Sequence[Place]) -> list[Summary]:
    """Every rule of the study over these windows; raises StatisticsError without any."""
    return [_summary(study, rule, places) for rule in study.rules]


def _summary(study: Study, rule: str, places: Sequence[Place]) -> Summary:
    pairs = [(place, place.case(rule)) for place in places]
    target = study.views[IN]
    regrets = [place.regret(case, target) for place, case in pairs]
    newest = [place.gain(case, "newest", target).mean for place, case in pairs]
    decays = [share for pair in pairs if (share := of_decay(study, *pair)) is not None]
    branch = [saved for pair in pairs if (saved := saved_of_branch(study, *pair)) is not None]
    merged = mean_losses([case.losses for _, case in pairs])
    return Summary(
        rule=rule,
        windows=len(pairs),
        losses={view: merged.target(weights).mean for view, weights in study.views.items()},
        gains=mean_gains(study, pairs),
        wins=sum(regret <= _SAME for regret in regrets),
        worst_regret=max(regrets),
        worse_than_newest=sum(gain < -_SAME for gain in newest),
        evaluations=statistics.mean(case.evaluations for _, case in pairs),
        declined=sum(case.no_gain is not None for _, case in pairs),
        against_run=_savings([saved_of_run(study, place, case) for place, case in pairs]),
        against_branch=_savings(branch) if branch else None,
        of_decay=statistics.median(decays) if decays else None,
    )


def mean_gains(study: Study, pairs: Sequence[tuple[Place, Case]]) -> Gains:
    """Gains over the references, averaged over windows document by document."""
    merged = mean_losses([case.losses for _, case in pairs])
    gains = {}
    for name in REFERENCES:
        reference = mean_losses([place.references[name] for place, _ in pairs])
        differences = reference.minus(merged)
        gains[name] = {view: combine(differences, w) for view, w in study.views.items()}
    return gains


def cost_in_steps(study: Study, place: Place, case: Case) -> float | None:
    """What the fusion cost, in steps of training; None where their tokens are not known."""
    step = study.scale.step_flops
    flops = study.scale.fusion_flops(members=place.size, evaluations=case.evaluations)
    return None if step is None else flops / step


def saved_of_run(study: Study, place: Place, case: Case) -> Saving:
    """Steps that the raw run goes on for until it reaches the merge's loss."""
    loss = case.losses.target(study.views[IN]).mean
    cost = cost_in_steps(study, place, case)
    return saving(curve_of(study), place.step, loss, cost=cost)


def saved_of_branch(study: Study, place: Place, case: Case) -> Saving | None:
    """Steps of the decay branch until it reaches the merge's loss; None if it begins elsewhere."""
    branch = branch_of(study)
    if not branch or branch[0][0] != place.step:
        return None
    loss = case.losses.target(study.views[IN]).mean
    return saving(branch, place.step, loss, cost=cost_in_steps(study, place, case))


def of_decay(study: Study, place: Place, case: Case) -> float | None:
    """The part of the decay's gain that a merge at its beginning has."""
    branch = branch_of(study)
    if not branch or branch[0][0] != place.step:
        return None
    return recovered(branch, case.losses.target(study.views[IN]).mean)


def curve_of(study: Study, view: str = IN) -> Curve:
    return [(point.step, point.losses[view]) for point in study.curve]


def branch_of(study: Study, view: str = IN) -> Curve:
    """The decay from the checkpoint that it starts from; empty without one."""
    branch = [(point.step, point.losses[view]) for point in study.branch]
    return with_branch(curve_of(study, view), branch) if branch else []


def _savings(found: Sequence[Saving]) -> Savings:
    net = [saved.net for saved in found if saved.net is not None]
    return Savings(
        windows=len(found),
        median=statistics.median(saved.steps for saved in found),
        median_net=statistics.median(net) if net else None,
        open_ended=sum(saved.at_least for saved in found),
    )
