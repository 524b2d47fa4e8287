"""What all figures have in common: their frame, and SVG text that does not change by itself."""

import io

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RAW, BEST, FUSED = "#8a8f98", "#3b6ea8", "#c2452d"


def axes(*, height: float) -> tuple[Figure, Axes]:
    """A figure with one set of axes, as wide as a page; height in inches."""
    figure = Figure(figsize=(7.6, height), layout="constrained")
    drawn = figure.add_subplot()
    drawn.spines[["top", "right"]].set_visible(False)
    drawn.grid(color="#e6e6e6", lw=0.6)
    drawn.set_axisbelow(True)
    return figure, drawn


def svg(figure: Figure) -> str:
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ckptfuse"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
