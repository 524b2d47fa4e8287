"""A study for people: one Markdown page of tables, and figures beside it."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from ckptfuse.losses import Estimate
from ckptfuse.study import figures
from ckptfuse.study.cases import DRIFT, IN, KINDS, OUT, REFERENCES, Study
from ckptfuse.study.plain import as_json
from ckptfuse.study.tables import Savings, summarise

_OVER = {"newest": "over newest", "best": "over best single", "uniform": "over uniform"}


def write_study(study: Study, folder: Path) -> Path:
    """Write ``study.md``, ``study.json`` and figures into a folder; returns the first's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in figures.drawings(study).items():
        (folder / f"{name}.svg").write_text(drawing)
    (folder / "study.json").write_text(as_json(study))
    page = folder / "study.md"
    page.write_text(as_markdown(study))
    return page


def as_markdown(study: Study) -> str:
    """The tables, with how to read them."""
    parts = [_heading(study), *_rule_tables(study), _by_size(study), _by_kind(study)]
    return "\n\n".join([*parts, _compute(study)]) + "\n"


def _heading(study: Study) -> str:
    first, last = study.curve[0].step, study.curve[-1].step
    ends = sorted({place.step for place in study.places})
    about = (
        f"{len(study.curve)} checkpoints, steps {first} to {last}, "
        f"{study.scale.parameters:,} parameters. Windows of "
        f"{', '.join(map(str, study.sizes))} checkpoints that end at steps "
        f"{', '.join(map(str, ends))}. Losses are of audit text, in nats per token; gains are "
        "paired by document, positive where the merge is better, ± the standard error from "
        "sampling documents. Weights follow from selection text."
    )
    texts = [f"{_named(view)}: {', '.join(study.counted(view))}." for view in study.views]
    return "\n\n".join([f"# Study of {study.name}", about, *texts])


def _rule_tables(study: Study) -> Iterable[str]:
    summaries = summarise(study, study.places)
    for view in study.views:
        head = ["rule", *(_OVER[name] for name in REFERENCES)]
        if view == IN:
            head += ["wins", "worst regret", "worse than newest", "merges measured"]
        rows = []
        for found in summaries:
            row = [found.rule, *(_signed(found.gains[name][view]) for name in REFERENCES)]
            if view == IN:
                row += [
                    f"{found.wins} of {found.windows}",
                    f"{found.worst_regret:.4f}",
                    f"{found.worse_than_newest}",
                    f"{found.evaluations:.1f}",
                ]
            rows.append(row)
        yield f"## {_named(view)}\n\n{_table(head, rows)}"


def _by_size(study: Study) -> str:
    by_size = {size: summarise(study, study.of_size(size)) for size in study.sizes}
    rows = [
        [rule, *(_signed(found[i].gains["newest"][IN]) for found in by_size.values())]
        for i, rule in enumerate(study.rules)
    ]
    table = _table(["rule", *(f"K = {size}" for size in by_size)], rows)
    return f"## Gain over the newest checkpoint by window length\n\n{table}"


def _by_kind(study: Study) -> str:
    by_kind = {kind: found for kind in KINDS if (found := study.of_kind(kind))}
    present = {kind: summarise(study, places) for kind, places in by_kind.items()}
    rows = [
        [rule, *(_signed(found[i].gains["uniform"][IN]) for found in present.values())]
        for i, rule in enumerate(study.rules)
    ]
    head = [f"{kind} ({len(by_kind[kind])})" for kind in present]
    return (
        "## Gain over uniform weights by kind of window\n\n"
        "Damaged: a checkpoint left the trend of those before it; drifting: the loss falls by "
        f"more than {DRIFT:g} nats over the window.\n\n" + _table(["rule", *head], rows)
    )


def _compute(study: Study) -> str:
    head = ["rule", "steps saved", "net of cost", "lower bounds"]
    with_branch = bool(study.branch)
    if with_branch:
        head += ["of the decay branch", "net of cost", "part of the decay's gain"]
    rows = []
    for found in summarise(study, study.places):
        row = [found.rule, *_saving_cells(found.against_run), str(found.against_run.open_ended)]
        if with_branch:
            row += _saving_cells(found.against_branch)
            row.append("" if found.of_decay is None else f"{found.of_decay:.0%}")
        rows.append(row)
    return (
        "## Compute saved\n\n"
        "Further steps that the raw run takes to reach the merge's loss, in the median over "
        "windows; a lower bound where it never did. Cost: scoring all members and the merge, and "
        "merging, as training steps of the same FLOPs"
        + (
            ". The decay branch begins where it leaves the run: steps that it takes to the loss "
            "of a merge made at its beginning"
            if with_branch
            else ""
        )
        + ".\n\n"
        + _table(head, rows)
    )


def _saving_cells(savings: Savings | None) -> list[str]:
    if savings is None:
        return ["", ""]
    net = savings.median_net
    return [f"{savings.median:.0f}", "unknown" if net is None else f"{net:.0f}"]


def _named(view: str) -> str:
    return {IN: "In distribution", OUT: "Out of distribution"}[view]


def _signed(found: Estimate) -> str:
    error = found.standard_error
    return f"{found.mean:+.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
