"""A study as plain values, for programs."""

import json
import math
from typing import Any

from ckptfuse.losses import Estimate
from ckptfuse.study.cases import IN, KINDS, REFERENCES, Case, Place, Study
from ckptfuse.study.tables import (
    Savings,
    Summary,
    cost_in_steps,
    saved_of_branch,
    saved_of_run,
    summarise,
)


def as_json(study: Study) -> str:
    """Every window and rule, and the tables."""
    values = {
        "trajectory": study.name,
        "domains": {view: study.counted(view) for view in study.views},
        "parameters": study.scale.parameters,
        "tokens_per_step": study.scale.tokens_per_step,
        "scored_tokens": dict(study.scale.scored),
        "curve": [{"step": point.step, "loss": point.losses} for point in study.curve],
        "decay_branch": [{"step": point.step, "loss": point.losses} for point in study.branch],
        "windows": [_place(study, place) for place in study.places],
        "rules": [_row(summary) for summary in summarise(study, study.places)],
        "by_size": {
            size: [_row(s) for s in summarise(study, study.of_size(size))] for size in study.sizes
        },
        "by_kind": {
            kind: [_row(s) for s in summarise(study, found)]
            for kind in KINDS
            if (found := study.of_kind(kind))
        },
    }
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def _place(study: Study, place: Place) -> dict[str, Any]:
    return {
        "steps": place.steps,
        "kind": place.kind,
        "spikes": place.spikes,
        "fall": place.fall,
        "loss": {
            name: {v: losses.target(w).mean for v, w in study.views.items()}
            for name, losses in place.references.items()
        },
        "rules": [_case(study, place, case) for case in place.cases],
    }


def _case(study: Study, place: Place, case: Case) -> dict[str, Any]:
    against_run = saved_of_run(study, place, case)
    against_branch = saved_of_branch(study, place, case)
    return {
        "rule": case.rule,
        "weights": case.weights,
        "evaluations": case.evaluations,
        "no_gain": case.no_gain,
        "loss": {v: case.losses.target(w).mean for v, w in study.views.items()},
        "gain": {
            name: {v: _estimate(place.gain(case, name, w)) for v, w in study.views.items()}
            for name in REFERENCES
        },
        "regret": place.regret(case, study.views[IN]),
        "steps_saved": against_run.steps,
        "steps_saved_is_at_least": against_run.at_least,
        "steps_saved_of_branch": None if against_branch is None else against_branch.steps,
        "cost_in_steps": cost_in_steps(study, place, case),
    }


def _row(summary: Summary) -> dict[str, Any]:
    return {
        "rule": summary.rule,
        "windows": summary.windows,
        "loss": summary.losses,
        "gain": {
            name: {view: _estimate(found) for view, found in gains.items()}
            for name, gains in summary.gains.items()
        },
        "wins": summary.wins,
        "worst_regret": summary.worst_regret,
        "worse_than_newest": summary.worse_than_newest,
        "evaluations": summary.evaluations,
        "declined": summary.declined,
        "steps_saved": _saved(summary.against_run),
        "steps_saved_of_branch": summary.against_branch and _saved(summary.against_branch),
        "of_decay": summary.of_decay,
    }


def _saved(savings: Savings) -> dict[str, Any]:
    return {
        "windows": savings.windows,
        "median": savings.median,
        "median_net": savings.median_net,
        "lower_bounds": savings.open_ended,
    }


def _estimate(found: Estimate) -> dict[str, float | None]:
    error = found.standard_error
    return {"mean": found.mean, "standard_error": error if math.isfinite(error) else None}
