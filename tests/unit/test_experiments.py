"""The reference study's definition, and how its targets are judged; nothing is trained here."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import targets
from experiments.runs import RUNS, TRAJECTORIES, Run, tiny_run, tiny_trajectory

IN = targets.IN


def window(loss: float, *, size: int = 5, kind: str = "steady", regret: float = 0.0,
           end: int = 100) -> dict[str, Any]:  # fmt: skip
    case = {"rule": "calibrated", "loss": {IN: loss}, "regret": regret}
    return {"steps": [*range(size - 1), end], "kind": kind, "rules": [case]}


def results(*pairs: tuple[dict[str, Any], dict[str, Any]], **more: Any) -> dict[str, Any]:
    study = {"windows": [w for w, _ in pairs], "by_kind": more.get("by_kind", {})}
    checks = {"windows": [c for _, c in pairs], "gate": more.get("gate", [])}
    return {"run": {"study": study, "checks": checks}}


def estimate(mean: float, error: float = 0.001) -> dict[str, float]:
    return {"mean": mean, "standard_error": error}


# -- the definition ----------------------------------------------------------------------------


def test_the_study_has_what_it_must() -> None:
    names = {trajectory.name for trajectory in TRAJECTORIES}
    assert {"constant", "cosine", "wsd", "spikes", "damaged", "gpt-neox", "mixtral"} <= names
    assert len({run.seed for run in RUNS}) >= 2
    assert len({(run.hidden, run.layers) for run in RUNS}) >= 2
    assert {trajectory.run for trajectory in TRAJECTORIES} == {run.name for run in RUNS}
    assert targets.noise(RUNS).met


@pytest.mark.parametrize("tiny", [False, True])
def test_every_window_that_is_named_can_be_made(tiny: bool) -> None:
    runs = {run.name: tiny_run(run) if tiny else run for run in RUNS}
    for trajectory in map(tiny_trajectory, TRAJECTORIES) if tiny else TRAJECTORIES:
        run = runs[trajectory.run]
        saves = run.saves if not trajectory.decays else (run.branch or 0) + run.branch_saves
        assert max(trajectory.ends) <= saves
        assert min(trajectory.ends) >= max(trajectory.sizes)
        for spoiled in trajectory.spoiled:
            assert any(end - min(trajectory.sizes) < spoiled <= end for end in trajectory.ends)


def test_rates_warm_up_burst_and_decay() -> None:
    run = Run("r", every=10, saves=20, rate=1.0, bursts=(8,), branch=10, branch_saves=5)
    assert [run.rate_at(step) for step in (5, 20, 70)] == [0.25, 1.0, 1.0]
    assert [run.rate_at(step) for step in (77, 78, 80, 81)] == [1.0, 10.0, 10.0, 1.0]
    assert [run.decay_at(step) for step in (100, 125, 150)] == [1.0, 0.5, 0.0]
    cosine = replace(run, schedule="cosine", bursts=())
    assert [cosine.rate_at(step) for step in (20, 110, 200)] == pytest.approx([1.0, 0.5, 0.0])


# -- the targets -------------------------------------------------------------------------------


@given(st.lists(st.floats(-0.01, 0.01), min_size=1, max_size=6))
def test_one_healthy_window_above_the_limit_misses_and_damaged_ones_do_not_count(
    above: list[float],
) -> None:
    pairs = [(window(2.0), {"named": estimate(value)}) for value in above]
    damaged = (window(2.0, kind="damaged"), {"named": estimate(1.0)})
    found = targets.named_rules(results(*pairs, damaged))
    assert found.met == (max(above) <= 0.003)
    assert f"{sum(value > 0.003 for value in above)} above" in found.found


def test_uniform_must_be_beaten_in_every_group_of_drifting_or_damaged_windows() -> None:
    def group(mean: float) -> list[dict[str, Any]]:
        return [{"rule": "calibrated", "gain": {"uniform": {IN: estimate(mean)}}}]

    good = {"drifting": group(0.01), "damaged": group(0.5), "steady": group(-1.0)}
    assert targets.uniform(results(by_kind=good)).met
    bad = targets.uniform(results(by_kind={**good, "damaged": group(0.0009)}))
    assert bad.met is False
    assert "run, damaged: +0.0009 ± 0.0010" in bad.found
    assert targets.uniform(results(by_kind={})).met is None


def test_predictions_are_judged_by_their_own_errors() -> None:
    def item(miss: float, shown: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        merge = {"measured": 2.0 + miss, "predicted": 2.0, "standard_error": 0.01}
        return window(2.0), {"noise_energy_is_shown": shown, "predictions": [merge] * 19}

    assert targets.predictions(results(item(0.019))).met
    wild = (window(2.0), {"noise_energy_is_shown": True,
                          "predictions": [{"measured": 2.1, "predicted": 2.0,
                                           "standard_error": 0.01}] * 2})  # fmt: skip
    assert targets.predictions(results(item(0.019), wild)).met is False
    assert targets.predictions(results(item(0.5, shown=False))).met is None


def test_flatness_is_between_window_lengths_at_one_healthy_end() -> None:
    flat = [(window(2.0, size=5), {}), (window(2.004, size=20), {})]
    assert targets.flat(results(*flat)).met
    assert targets.flat(results(*flat, (window(2.1, size=3), {}))).met, "shorter than 5"
    assert targets.flat(results(*flat, (window(2.1, end=50), {}))).met, "another end"
    steep = results(*flat, (window(2.006, size=12), {}))
    assert targets.flat(steep).met is False
    hurt = results((window(2.0), {}), (window(2.9, size=20, kind="damaged"), {}))
    assert targets.flat(hurt).met is None


def test_damage_is_judged_by_the_worst_regret() -> None:
    def found(regret: float) -> bool | None:
        damaged = window(2.0, kind="damaged", regret=regret)
        return targets.damage(results((window(2.0, regret=9.0), {}), (damaged, {}))).met

    assert (found(0.02), found(0.021)) == (True, False)


def test_what_was_published_is_judged_on_text_that_judged_nothing() -> None:
    def published(report: float) -> dict[str, Any]:
        gains = {"audit": {"best": estimate(0.1)}, "report": {"best": estimate(report)}}
        return {"step": 1, "verdict": "publish", **gains}

    declined = {"step": 2, "verdict": "declined"}
    assert targets.gate(results(gate=[published(0.1)] * 20 + [declined])).met
    assert targets.gate(results(gate=[published(0.1)] * 19 + [published(-0.1)])).met, "5 %"
    two = targets.gate(results(gate=[published(0.1)] * 18 + [published(-0.1)] * 2))
    assert two.met is False
    assert "2 are not better" in two.found
    assert targets.gate(results(gate=[declined])).met is None
