"""A study's figures, as SVG text."""

import math
from typing import Any

from matplotlib.axes import Axes

from ckptfuse.report import drawing
from ckptfuse.report.drawing import BEST, FUSED, RAW
from ckptfuse.study.cases import IN, OUT, Study
from ckptfuse.study.compute import Curve
from ckptfuse.study.tables import branch_of, curve_of, summarise

_TITLES = {IN: "in distribution", OUT: "out of distribution"}
#: Singles are the frame of reference, and no curves of their own.
_SINGLES = ("latest", "best")


def drawings(study: Study) -> dict[str, str]:
    """File name without its end -> SVG."""
    return {"losses": losses(study)} | {
        f"gains-{view.replace('_', '-')}": gains(study, view) for view in study.views
    }


def losses(study: Study) -> str:
    """The raw curve, its decay branch, and the merges of each rule over the largest windows."""
    figure, axes = drawing.axes(height=3.6)
    axes.plot(*_columns(curve_of(study)), color=RAW, marker="o", ms=2.5, label="raw checkpoint")
    if study.branch:
        axes.plot(*_columns(branch_of(study)), color=BEST, lw=1.2, ls="--", label="decay branch")
    largest = study.of_size(study.sizes[-1])
    for rule in (rule for rule in study.rules if rule not in _SINGLES):
        points = [(p.step, p.case(rule).losses.target(study.views[IN]).mean) for p in largest]
        axes.plot(*_columns(points), **_style(rule), label=rule)
    _zoom(axes, [loss for _, loss in curve_of(study)])
    axes.set_xlabel("training step")
    axes.set_ylabel(f"loss, windows of {study.sizes[-1]}\n(nats per token)")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return drawing.svg(figure)


def gains(study: Study, view: str) -> str:
    """Gain over the newest checkpoint by window length, ± 2 standard errors, for each rule."""
    figure, axes = drawing.axes(height=3.4)
    by_size = {size: summarise(study, study.of_size(size)) for size in study.sizes}
    for index, rule in enumerate(study.rules):
        if rule in _SINGLES:
            continue
        found = [summaries[index].gains["newest"][view] for summaries in by_size.values()]
        errors = [2 * e.standard_error if math.isfinite(e.standard_error) else 0.0 for e in found]
        axes.errorbar(
            list(by_size), [e.mean for e in found], errors, **_style(rule), elinewidth=0.6,
            label=rule,
        )  # fmt: skip
    axes.axhline(0, color="#444", lw=0.8)
    axes.set_xlabel("checkpoints in the window")
    axes.set_ylabel(f"nats better than the newest,\n{_TITLES[view]}")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return drawing.svg(figure)


def _style(rule: str) -> dict[str, Any]:
    """The default rule stands out."""
    if rule.partition("(")[0] == "calibrated":
        return {"color": FUSED, "lw": 1.8, "marker": "o", "ms": 4, "zorder": 3}
    return {"lw": 1, "marker": ".", "ms": 4}


def _columns(points: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _zoom(axes: Axes, curve: list[float]) -> None:
    """Leave the first descent out of sight: it would flatten all that follows."""
    low, high = min(curve), sorted(curve)[(3 * len(curve)) // 4]
    axes.set_ylim(low - 0.8 * (high - low), high + 0.5 * (high - low))
