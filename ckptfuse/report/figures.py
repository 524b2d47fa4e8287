"""The report's figures, as SVG text: losses over training, weights, gains by domain."""

import math
from collections.abc import Sequence

from ckptfuse.losses import Estimate
from ckptfuse.notes import ENERGY, ENERGY_ERROR, domain_energies
from ckptfuse.overview import PUBLISHED, Overview, Row
from ckptfuse.report import drawing
from ckptfuse.report.drawing import BEST, FUSED, RAW

LEGIBLE = 40  # fusions, a line each


def losses(seen: Overview) -> str:
    """Raw, best single and merged loss by training step; published fusions are filled."""
    figure, axes = drawing.axes(height=3.4)
    axes.plot(*_points(seen.rows, "loss"), color=RAW, marker="o", ms=3, label="raw checkpoint")
    axes.plot(*_points(seen.rows, "best_single"), color=BEST, lw=1, ls="--", label="best single")
    axes.plot(*_points(seen.rows, "fused"), color=FUSED, lw=1.6, label="merged")
    spikes = [row for row in seen.rows if row.spike is not None]
    if spikes:
        axes.plot(*_points(spikes, "loss"), "x", color="#222", ms=7, label="spike")
    published = [row for row in seen.rows if row.verdict in PUBLISHED]
    axes.plot(*_points(seen.rows, "fused"), "o", ms=5, color=FUSED, mfc="w")
    axes.plot(*_points(published, "fused"), "o", ms=5, color=FUSED)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    return drawing.svg(figure)


def weights(seen: Overview) -> str:
    """For each of the newest fusions, the weight of every checkpoint it drew from."""
    planned = [row for row in seen.rows if row.plan is not None][-LEGIBLE:]
    figure, axes = drawing.axes(height=max(1.6, 0.28 * len(planned) + 0.9))
    sources = sorted({m.step for row in planned for m in (row.plan.members if row.plan else [])})
    grid = [
        [{m.step: m.weight for m in row.plan.members}.get(step, 0.0) for step in sources]
        for row in planned
        if row.plan is not None
    ]
    image = axes.imshow(grid, cmap="OrRd", vmin=0, aspect="auto")
    axes.set_xticks(range(len(sources)), [str(step) for step in sources], rotation=45)
    axes.set_yticks(range(len(planned)), [str(row.step) for row in planned])
    axes.set_xlabel("checkpoint (step)")
    axes.set_ylabel("fusion at step")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="weight")
    return drawing.svg(figure)


def domain_gains(gains: dict[str, Estimate]) -> str:
    """Gain over the newest checkpoint by domain, with 95 % intervals."""
    figure, axes = drawing.axes(height=0.4 * len(gains) + 0.9)
    names = list(gains)
    means = [gains[name].mean for name in names]
    errors = [1.96 * gains[name].standard_error for name in names]
    axes.barh(names, means, xerr=errors, color=FUSED, ecolor="#444", height=0.5)
    axes.axvline(0, color="#444", lw=0.8)
    axes.set_xlabel("nats per token better than the newest checkpoint")
    return drawing.svg(figure)


def noise_energy(seen: Overview) -> str:
    """The loss that one checkpoint's noise costs, by training step; thin: of each domain alone."""
    plans = [row.plan for row in seen.rows if row.plan and ENERGY in row.plan.notes]
    figure, axes = drawing.axes(height=2.6)
    steps = [plan.step for plan in plans]
    energies = [plan.notes[ENERGY] for plan in plans]
    errors = [2 * plan.notes.get(ENERGY_ERROR, 0.0) for plan in plans]
    axes.errorbar(steps, energies, errors, color=BEST, marker="o", ms=3, label="target, ± 2 s.e.")
    domains = sorted({name for plan in plans for name in domain_energies(plan.notes)})
    for name in domains if len(domains) > 1 else []:
        values = [domain_energies(plan.notes).get(name, math.nan) for plan in plans]
        axes.plot(steps, values, lw=0.8, label=name)
    axes.axhline(0, color="#444", lw=0.8)
    axes.set_xlabel("training step")
    axes.set_ylabel("noise energy (nats)")
    axes.legend(frameon=False, ncols=4)
    return drawing.svg(figure)


def predictions(seen: Overview) -> str:
    """Measured less predicted loss of every merge that a rule predicted, with 2 standard errors."""
    found = [
        (row.step, merge.loss - merge.predicted, 2 * (merge.standard_error or 0.0))
        for row in seen.rows
        for merge in (row.plan.merges if row.plan else [])
        if merge.predicted is not None
    ]
    figure, axes = drawing.axes(height=2.2)
    steps, misses, errors = zip(*found, strict=True)
    axes.errorbar(steps, misses, errors, color=FUSED, fmt="o", ms=3, lw=0.8)
    axes.axhline(0, color="#444", lw=0.8)
    axes.set_xlabel("training step")
    axes.set_ylabel("measured - predicted\n(nats)")
    return drawing.svg(figure)


def _points(rows: Sequence[Row], field: str) -> tuple[list[int], list[float]]:
    known = [(row.step, getattr(row, field)) for row in rows if getattr(row, field) is not None]
    return [step for step, _ in known], [value for _, value in known]
