"""What the rules are held to, and whether they keep it: computed from the studies, not by hand.

Each function takes the studies as they were written, by trajectory: ``study`` is study.json and
``checks`` is checks.json. Losses are of audit text in distribution, in nats per token.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.runs import Run

Results = Mapping[str, Mapping[str, Any]]
IN = "in_distribution"
RULE = "calibrated"

NAMED_LIMIT = 0.003
OPTIMUM_LIMIT = 0.005
FLAT_LIMIT = 0.005
FLAT_FROM = 5
DAMAGE_LIMIT = 0.02
NOISE_FACTOR = 10.0
WITHIN_TWO_ERRORS = 0.95
ERROR_RATE = 0.05


@dataclass(frozen=True, slots=True)
class Target:
    """One promise: what it says, what was found, whether it is kept. None: nothing to judge by."""

    statement: str
    found: str
    met: bool | None


def targets(results: Results, runs: Sequence[Run]) -> list[Target]:
    return [
        named_rules(results),
        uniform(results),
        optimised(results),
        predictions(results),
        noise(runs),
        flat(results),
        damage(results),
        gate(results),
    ]


def named_rules(results: Results) -> Target:
    above = [
        (item["named"]["mean"], _where(name, window), item["named"])
        for name, window, item in _windows(results)
        if window["kind"] != "damaged"
    ]
    missed = [found for found in above if found[0] > NAMED_LIMIT]
    beyond = [f for f in missed if f[0] - 2 * f[2]["standard_error"] > NAMED_LIMIT]
    said = _worst(above, "healthy windows", NAMED_LIMIT)
    if missed:
        said += f"; {len(beyond)} of those by more than two standard errors"
    return Target(
        "in no healthy window more than 0.003 nats worse than the best of latest, best, uniform, "
        "linear, ema, minus-sqrt and inverse-perplexity",
        said,
        not missed if above else None,
    )


def uniform(results: Results) -> Target:
    means, failed = [], []
    for name, result in results.items():
        for kind in ("drifting", "damaged"):
            for row in result["study"]["by_kind"].get(kind, []):
                if row["rule"] == RULE:
                    gain = row["gain"]["uniform"][IN]
                    means.append(gain["mean"])
                    if not gain["mean"] > gain["standard_error"]:
                        failed.append(f"{name}, {kind}: {_signed(gain)}")
    if not means:
        return Target("better than uniform where there is drift or damage", "no such window", None)
    found = (
        f"mean gain {statistics.mean(means):+.4f} nats over {len(means)} groups of windows (by "
        f"trajectory and kind), least {min(means):+.4f}"
    )
    return Target(
        "better than uniform by more than a standard error in windows with drift or damage, in "
        "each trajectory",
        found + (f"; not in {'; '.join(failed)}" if failed else ""),
        not failed,
    )


def optimised(results: Results) -> Target:
    above = [
        (item["optimised"]["mean"], _where(name, window))
        for name, window, item in _windows(results)
        if "optimised" in item
    ]
    return Target(
        "within 0.005 nats of weights found by gradient descent",
        _worst(above, "windows", OPTIMUM_LIMIT),
        max(above)[0] <= OPTIMUM_LIMIT if above else None,
    )


def predictions(results: Results) -> Target:
    misses = [
        (merge["measured"] - merge["predicted"]) / merge["standard_error"]
        for _, _, item in _windows(results)
        if item.get("noise_energy_is_shown")
        for merge in item["predictions"]
    ]
    statement = "predicted losses of random weights within their stated errors of the measured"
    if not misses:
        return Target(statement, "none", None)
    within = sum(abs(miss) <= 2 for miss in misses) / len(misses)
    spread = math.sqrt(statistics.mean(miss**2 for miss in misses))
    return Target(
        statement,
        f"{within:.1%} of {len(misses)} within two standard errors (95 % asked); root mean square "
        f"{spread:.2f} errors, mean {statistics.mean(misses):+.2f}",
        within >= WITHIN_TWO_ERRORS,
    )


def noise(runs: Sequence[Run]) -> Target:
    """The noise of a step relative to its size goes with learning rate / batch."""
    scales = [run.rate / run.tokens_per_step for run in runs if run.schedule == "constant"]
    factor = max(scales) / min(scales)
    return Target(
        "noise scale (learning rate / batch) varied by a factor of 10 at least",
        f"a factor of {factor:.0f}",
        factor >= NOISE_FACTOR,
    )


def flat(results: Results) -> Target:
    spreads = []
    for name, result in results.items():
        by_end: dict[int, list[float]] = {}
        damaged = set()
        for window in result["study"]["windows"]:
            end = window["steps"][-1]
            if window["kind"] == "damaged":
                damaged.add(end)
            if len(window["steps"]) >= FLAT_FROM:
                by_end.setdefault(end, []).append(_case(window)["loss"][IN])
        spreads += [
            (max(losses) - min(losses), f"{name} at step {end}")
            for end, losses in by_end.items()
            if end not in damaged and len(losses) > 1
        ]
    return Target(
        "loss as a function of K flat within 0.005 nats from K = 5 to 20 (healthy windows)",
        _worst(spreads, "ends", FLAT_LIMIT),
        max(spreads)[0] <= FLAT_LIMIT if spreads else None,
    )


def damage(results: Results) -> Target:
    regrets = [
        (_case(window)["regret"], _where(name, window))
        for name, window, _ in _windows(results)
        if window["kind"] == "damaged"
    ]
    return Target(
        "with a damaged checkpoint in the window at most 0.02 nats above the best rule",
        _worst(regrets, "windows", DAMAGE_LIMIT),
        max(regrets)[0] <= DAMAGE_LIMIT if regrets else None,
    )


def gate(results: Results) -> Target:
    verdicts = [(name, item) for name, r in results.items() for item in r["checks"]["gate"]]
    published = [(name, item) for name, item in verdicts if item["verdict"] == "publish"]
    worse = [
        f"{name} at step {item['step']}"
        for name, item in published
        if item["report"]["best"]["mean"] <= 0
    ]
    statement = "what the gate publishes is better than the best single checkpoint"
    if not published:
        return Target(statement, f"none of {len(verdicts)} fusions was published", None)
    on_audit = min(item["audit"]["best"]["mean"] for _, item in published)
    on_report = [item["report"]["best"]["mean"] for _, item in published]
    return Target(
        statement,
        f"{len(published)} of {len(verdicts)} fusions published; least gain on audit "
        f"{on_audit:+.4f}; on report text, which judged nothing, {len(worse)} are not better, "
        f"mean gain {statistics.mean(on_report):+.4f}, least {min(on_report):+.4f}",
        len(worse) <= ERROR_RATE * len(published),
    )


# -- reading the studies -----------------------------------------------------------------------


def _windows(results: Results) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Trajectory, a window of its study, and what the checks found of that window."""
    for name, result in results.items():
        pairs = zip(result["study"]["windows"], result["checks"]["windows"], strict=True)
        for window, item in pairs:
            yield name, window, item


def _case(window: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(case for case in window["rules"] if case["rule"] == RULE)


def _where(name: str, window: Mapping[str, Any]) -> str:
    return f"{name}, K = {len(window['steps'])} to step {window['steps'][-1]}"


def _worst(found: Sequence[tuple[Any, ...]], what: str, limit: float) -> str:
    if not found:
        return f"no {what}"
    value, where = max(found, key=lambda item: float(item[0]))[:2]
    missed = sum(item[0] > limit for item in found)
    return f"at most {value:+.4f} ({where}) in {len(found)} {what}; {missed} above {limit:g}"


def _signed(gain: Mapping[str, float]) -> str:
    return f"{gain['mean']:+.4f} ± {gain['standard_error']:.4f}"
