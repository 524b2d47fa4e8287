"""The results as one page and as values, from what the studies wrote."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.measure import machine
from experiments.place import Place
from experiments.targets import IN, RULE, Results, Target, targets

HERE = Path(__file__).parent
OUT = "out_of_distribution"
KINDS = ("steady", "drifting", "damaged")

Row = Mapping[str, Any]


def write_results(place: Place, folder: Path) -> Path:
    """``results.md`` and ``results.json``; the reading, which a person wrote, ends the page."""
    results = {t.name: place.read(t.name) for t in place.trajectories()}
    judged = targets(results, place.runs())
    about = machine()
    values = {
        "machine": about,
        "targets": [asdict(target) for target in judged],
        "runs": [asdict(run) for run in place.runs()],
        "trajectories": {
            name: {**found["checks"], "study": _without_cases(found["study"])}
            for name, found in results.items()
        },
    }
    (folder / "results.json").write_text(json.dumps(_rounded(values), separators=(",", ":")) + "\n")
    page = folder / "results.md"
    page.write_text(_page(place, results, judged, about))
    return page


def _without_cases(study: Row) -> dict[str, Any]:
    """A study with the losses of each window's rules alone; the tables say the rest."""
    windows = [
        {
            "steps": [window["steps"][0], window["steps"][-1]],
            "size": len(window["steps"]),
            "kind": window["kind"],
            "loss": {case["rule"]: case["loss"] for case in window["rules"]},
            "weights": _row(window["rules"], RULE)["weights"],
        }
        for window in study["windows"]
    ]
    return {**study, "windows": windows}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _page(place: Place, results: Results, judged: Sequence[Target], about: Row) -> str:
    reading = HERE / "reading.md"
    sections = [
        _head(place, about),
        _trajectories(place, results),
        _rules(results),
        _by_trajectory(results),
        _by_length(results),
        _by_kind(results),
        _compute(results),
        _targets(judged),
    ]
    if reading.is_file():
        sections.append(reading.read_text().rstrip())
    return "\n\n".join(sections) + "\n"


def _head(place: Place, about: Row) -> str:
    tokens = place.corpus().tokens
    return (
        "# Reference study\n\n"
        "Written by `make experiments`; what is trained and studied stands in `runs.py`. Target "
        "text is held-out Python source, of the training distribution; prose and C (and "
        "JavaScript where the machine has it) are out of distribution and set no weight. "
        f"Selection {tokens.selection:,}, audit {tokens.audit:,}, report {tokens.report:,} tokens. "
        "All losses are of audit text, in nats per token; gains are positive where the merge is "
        "better.\n\n"
        f"{about['cpu']}, {about['cores']} cores, Python {about['python']}, torch "
        f"{about['torch']}; two processes of one thread."
    )


def _trajectories(place: Place, results: Results) -> str:
    rows = []
    for trajectory in place.trajectories():
        run = place.run(trajectory.run)
        study, checks = (results[trajectory.name][part] for part in ("study", "checks"))
        energies = [w for w in checks["windows"] if "noise_energy" in w]
        last = max(energies, key=lambda w: (w["step"], w["size"]))
        shares = [w["noise_share"] or 0.0 for w in checks["windows"]]
        curve = study["curve"]
        rows.append(
            [
                trajectory.name,
                trajectory.about,
                f"{study['parameters']:,}",
                f"{run.rate:g}",
                f"{run.tokens_per_step:,}",
                f"{curve[-1]['step']:,}",
                f"{curve[-1]['loss'][IN]:.3f}",
                f"{last['noise_energy']:.4f} ± {last['noise_energy_error']:.4f}",
                f"{min(shares):.2f} - {statistics.median(shares):.2f} - {max(shares):.2f}",
            ]
        )
    head = ["trajectory", "what it is", "parameters", "rate", "tokens a step", "steps",
            "last loss", "noise energy, last 20", "noise share: least, median, most"]  # fmt: skip
    return f"## Trajectories\n\n{_table(head, rows, left=2)}"


def _rules(results: Results) -> str:
    """Over all windows of all trajectories; errors are those between trajectories."""
    rows = []
    for rule in _shared_rules(results):
        found = [_row(result["study"]["rules"], rule) for result in results.values()]
        windows = sum(row["windows"] for row in found)
        rows.append(
            [
                rule,
                *(_gain(found, over, IN) for over in ("newest", "best", "uniform")),
                *(_gain(found, over, OUT) for over in ("newest", "uniform")),
                f"{sum(row['wins'] for row in found)} of {windows}",
                f"{max(row['worst_regret'] for row in found):.4f}",
                f"{sum(row['worse_than_newest'] for row in found)}",
                f"{statistics.mean(row['evaluations'] for row in found):.1f}",
            ]
        )  # fmt: skip
    head = ["rule", "over newest", "over best single", "over uniform", "other text: over newest",
            "other text: over uniform", "wins", "worst regret", "worse than newest",
            "merges measured"]  # fmt: skip
    return (
        "## Rules\n\nMeans over the windows of each trajectory, then over trajectories, ± the "
        "standard error between trajectories. A win: no rule of that study is better; regret: "
        f"how far above the best. Other text: out of distribution.\n\n{_table(head, rows)}"
    )


def _by_trajectory(results: Results) -> str:
    rules = [rule for rule in _shared_rules(results) if rule not in ("latest", "uniform")]
    rows = []
    for name, result in results.items():
        cells = []
        for rule in rules:
            gain = _row(result["study"]["rules"], rule)["gain"]["uniform"][IN]
            cells.append(f"{gain['mean']:+.4f} ± {gain['standard_error']:.4f}")
        rows.append([name, *cells])
    return (
        "## Gain over uniform weights by trajectory\n\n± the standard error from sampling "
        f"documents, paired.\n\n{_table(['trajectory', *rules], rows)}"
    )


def _by_length(results: Results) -> str:
    """Loss by K at the same ends, for the trajectories with all lengths, less that of K = 5."""
    lengths = max((r["study"]["by_size"] for r in results.values()), key=len)
    chosen = [
        r["study"] for r in results.values() if r["study"]["by_size"].keys() == lengths.keys()
    ]
    rows = []
    for rule in _shared_rules(results):
        if rule in ("latest", "best"):
            continue
        row = [rule]
        for size in lengths:
            gains = [_row(study["by_size"][size], rule)["gain"]["newest"][IN] for study in chosen]
            row.append(_mean([gain["mean"] for gain in gains]))
        rows.append(row)
    head = ["rule", *(f"K = {size}" for size in lengths)]
    return (
        f"## Gain over the newest checkpoint by window length\n\nThe {len(chosen)} constant-rate "
        "trajectories, at the same ends for every length, ± the standard error between "
        f"trajectories.\n\n{_table(head, rows)}"
    )


def _by_kind(results: Results) -> str:
    rows = []
    for rule in _shared_rules(results):
        row = [rule]
        for kind in KINDS:
            groups = [r["study"]["by_kind"][kind] for r in results.values()
                      if kind in r["study"]["by_kind"]]  # fmt: skip
            gains = [_row(group, rule)["gain"]["uniform"][IN]["mean"] for group in groups]
            row.append(_mean(gains) if gains else "")
        rows.append(row)
    windows = {
        kind: sum(w["kind"] == kind for r in results.values() for w in r["study"]["windows"])
        for kind in KINDS
    }
    head = ["rule", *(f"{kind} ({count} windows)" for kind, count in windows.items())]
    return (
        "## Gain over uniform weights by kind of window\n\nDamaged: a member left the trend of "
        "those before it. Drifting: the loss falls by more than 0.05 nats over the window. ± the "
        f"standard error between trajectories.\n\n{_table(head, rows)}"
    )


def _compute(results: Results) -> str:
    rows = []
    for name, result in results.items():
        found = _row(result["study"]["rules"], RULE)
        run, branch = found["steps_saved"], found["steps_saved_of_branch"]
        end = result["study"]["curve"][-1]["step"]
        rows.append(
            [
                name,
                f"{run['median']:.0f} of {end}",
                f"{run['median_net']:.0f}",
                f"{run['lower_bounds']} of {run['windows']}",
                "" if branch is None else f"{branch['median']:.0f}",
                "" if branch is None else f"{branch['median_net']:.0f}",
                "" if found["of_decay"] is None else f"{found['of_decay']:.0%}",
            ]
        )
    head = ["trajectory", "steps saved", "net", "lower bounds", "of the decay branch", "net",
            "part of the decay's gain"]  # fmt: skip
    return (
        f"## Compute that `{RULE}` saved\n\nSteps that the raw run goes on for until it reaches "
        "the merge's loss (median over windows; a lower bound where it ended before), and that "
        "the decay branch takes from where it starts. Net: less scoring and merging, in steps of "
        "the same FLOPs. Here a step has a thousand tokens and a score tens of thousands; in a "
        f"real run a step has millions, and the cost is nothing.\n\n{_table(head, rows)}"
    )


def _targets(judged: Sequence[Target]) -> str:
    word = {True: "met", False: "**missed**", None: "not judged"}
    rows = [[target.statement, target.found, word[target.met]] for target in judged]
    return (
        f"## Targets\n\nWhat `{RULE}` is held to, computed by `targets.py`.\n\n"
        f"{_table(['target', 'found', ''], rows, left=3)}"
    )


def _shared_rules(results: Results) -> list[str]:
    """The rules that every study has."""
    listed = [[row["rule"] for row in result["study"]["rules"]] for result in results.values()]
    return [rule for rule in listed[0] if all(rule in others for others in listed)]


def _row(rows: Sequence[Row], rule: str) -> Row:
    return next(row for row in rows if row["rule"] == rule)


def _gain(rows: Sequence[Row], over: str, view: str) -> str:
    return _mean([row["gain"][over][view]["mean"] for row in rows])


def _mean(values: Sequence[float]) -> str:
    """With the standard error between the values."""
    mean = f"{statistics.mean(values):+.4f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    marks = ["---" if column < left else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, marks, *rows])
