"""One trajectory: ``python -m experiments.examine FOLDER NAME``. Its study, and more checks.

predictions   random weights: the loss that the model of `calibrated` predicts, and measured
optimised     `calibrated` against weights found by gradient descent
noise_share   how much of the losses' differences `calibrated` took for noise
named         `calibrated` against the best of the rules that measure no merge
gate          the fusions of `calibrated` in the order of training, judged as the service does
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ckptfuse.losses import combine
from ckptfuse.params import Params
from ckptfuse.rules import get_rule
from ckptfuse.service import Service, open_service
from ckptfuse.study import IN, Case, Plan, Study, parse_rules, run_study, write_study
from ckptfuse.study import Place as Studied
from ckptfuse.study.choices import DEFAULT_RULES, RuleChoice
from ckptfuse.study.measure import Bench
from ckptfuse.study.run import choose_windows, scored_checkpoints
from experiments.gated import gated
from experiments.optimise import optimise
from experiments.place import Place
from experiments.predictions import predictions
from experiments.runs import Trajectory
from experiments.spoil import lay_bucket

#: The rules that `calibrated` is held against: all that need no merge measured.
NAMED = ("latest", "best", "uniform", "linear", "ema", "minus-sqrt", "inverse-perplexity")
SEARCHING = "greedy,bayes,auto"
GATED = 8  # checkpoints in the windows whose fusions go through the gate: the service's default


def examine(place: Place, name: str) -> None:
    """Study a trajectory and check it; everything measured is kept, so it can be resumed."""
    torch.set_num_threads(1)
    trajectory = place.trajectory(name)
    run = place.run(trajectory.run)
    bucket = place.bucket(name)
    if not bucket.exists():
        lay_bucket(place, name)
    params = Params.model_validate(
        {
            "trajectory": name,
            "bucket": str(bucket),
            "workspace": str(place.study(name)),
            "corpus": place.corpus().model_dump(),
            "scoring": {"block_length": 256, "threads": 1},
            "watch": {"settle_seconds": 0},
        }
    )
    rules = f"{DEFAULT_RULES},{SEARCHING}" if trajectory.searching else DEFAULT_RULES
    plan = Plan(
        parse_rules(rules),
        trajectory.sizes,
        ends=tuple(end * run.every for end in trajectory.ends),
        tokens_per_step=run.tokens_per_step,
    )
    branch = str(place.trained(run.name) / "branch") if trajectory.against_branch else None
    study = run_study(params, plan, branch=branch, say=_say)
    write_study(study, place.study(name))
    checks = _checks(open_service(params), study, plan, trajectory)
    place.checks(name).write_text(json.dumps(checks, indent=1) + "\n")


def _checks(service: Service, study: Study, plan: Plan, trajectory: Trajectory) -> dict[str, Any]:
    checkpoints = scored_checkpoints(service, _say)
    also = [studied.step for studied in study.places]
    windows = choose_windows(checkpoints, plan, service.params.window, also=also)
    pairs = list(zip(study.places, windows, strict=True))
    largest = trajectory.sizes[-1]
    gate_size = GATED if GATED in trajectory.sizes else largest
    found: dict[str, Any] = {"about": trajectory.about, "run": trajectory.run, "windows": []}
    for studied, window in pairs:
        _say(f"checks: {studied.size} to step {studied.step}")
        bench = Bench(service, window.members)
        item: dict[str, Any] = {"size": studied.size, "step": studied.step}
        item["named"] = _against_named(study, studied)
        item["noise_share"] = _noise_share(bench)
        if studied.size in (gate_size, largest):
            item |= predictions(bench, studied.step)
        if studied.size == largest and studied.step == study.places[-1].step:
            item["optimised"] = _against_optimum(service, study, studied, bench)
        found["windows"].append(item)
    found["gate"] = gated(service, study, [pair for pair in pairs if pair[0].size == gate_size])
    return found


def _against_named(study: Study, studied: Studied) -> dict[str, Any]:
    """How far above the best of the named rules `calibrated` is on audit, paired."""
    view = study.views[IN]
    cases = [studied.case(rule) for rule in NAMED]
    best = min(cases, key=lambda case: case.losses.target(view).mean)
    return {"best": best.rule, **_above(study, studied.case("calibrated"), best)}


def _noise_share(bench: Bench) -> float | None:
    """Of `calibrated`'s last word; None where its first merge did not contradict 0."""
    answer, _ = bench.ask(RuleChoice("calibrated", get_rule("calibrated")))
    return answer.notes.get("noise_share")


def _above(study: Study, case: Case, other: Case) -> dict[str, float]:
    found = combine(case.losses.minus(other.losses), study.views[IN])
    return {"mean": found.mean, "standard_error": found.standard_error}


def _against_optimum(
    service: Service, study: Study, studied: Studied, bench: Bench
) -> dict[str, Any]:
    item = service.scorer.block_set(bench.tokenizer, "selection")
    uris = [member.uri for member in bench.members]
    domain = study.counted(IN)[0]
    optimum = optimise(uris, item, domain, service.scorer.numerics)
    bench.score([optimum.weights], ("selection", "audit"))
    case = Case("optimised", optimum.weights, optimum.passes, None, bench.audit(optimum.weights))
    return {
        "passes": optimum.passes,
        "weights": optimum.weights,
        "loss": case.losses.target(study.views[IN]).mean,
        **_above(study, studied.case("calibrated"), case),
    }


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    examine(Place(Path(sys.argv[1]), tiny="--tiny" in sys.argv), sys.argv[2])
