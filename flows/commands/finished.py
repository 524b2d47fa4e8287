"""The commands for a finished trajectory: replay it through the service, or study rules on it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from ckptfuse.errors import ConfigurationError
from flows.commands.by_hand import domains_of
from flows.commands.console import stderr, stdout
from flows.commands.service import ParamsOption, load, log_to_stderr, preflight, sentence

if TYPE_CHECKING:
    from ckptfuse.params import Params

CorpusOption = Annotated[
    list[str] | None,
    typer.Option(help="NAME=PATH: text; repeatable  [default: corpus.domains of params.yaml]"),
]


def backfill(
    bucket: Annotated[
        str | None, typer.Argument(help="Folder or s3:// prefix  [default: that of params.yaml]")
    ] = None,
    corpus: CorpusOption = None,
    every: Annotated[int | None, typer.Option(min=1, help="Replay every k-th checkpoint.")] = None,
    first: Annotated[int | None, typer.Option("--from", help="Begin at this step.")] = None,
    last: Annotated[int | None, typer.Option("--to", help="End at this step.")] = None,
    workspace: Annotated[
        Path | None, typer.Option(help="Folder to write to  [default: that of params.yaml]")
    ] = None,
    params: ParamsOption = None,
) -> None:
    """Replay a finished trajectory: fuse and judge every window, oldest first."""
    if first is not None and last is not None and first > last:
        raise ConfigurationError(f"--from {first} --to {last}: nothing lies between them")
    if bucket is None and not corpus and workspace is None and every is None:
        loaded, file = load(params)
    else:
        loaded, file = _given(params, bucket, corpus or [], workspace, every)
    preflight(loaded)
    log_to_stderr()
    from ckptfuse.overview import overview
    from ckptfuse.report.page import write_report
    from ckptfuse.service import open_service
    from flows.backfill import backfill as backfill_flow
    from flows.opening import start_server
    from flows.show import table

    start_server()
    summary = backfill_flow(file, first=first, last=last)
    service = open_service(loaded)
    stdout.print(table(overview(service)))
    stdout.print(sentence(summary), markup=False)
    stderr.print(f"raw against merged, drawn: {write_report(service)}", markup=False)
    if summary.busy or summary.delayed or summary.held:
        raise typer.Exit(1)


def _given(
    params: Path | None,
    bucket: str | None,
    corpus: list[str],
    workspace: Path | None,
    every: int | None,
) -> tuple["Params", str]:
    """Parameters of the command line over those of a file, in a file of their own."""
    from ckptfuse.given import params_given
    from ckptfuse.params_loading import keep_apart
    from ckptfuse.workspace import Workspace, make_folder

    base, has_file = _base(params)
    corpora = domains_of(corpus, "--corpus")
    uri = bucket or base.bucket
    if uri is None or not (corpora or base.corpus.domains):
        raise ConfigurationError(
            "a trajectory and text are needed: ckptfuse backfill BUCKET --corpus NAME=PATH, or a "
            "params.yaml that names them"
        )
    chosen = params_given(base, uri, corpora)
    if has_file and workspace is None and base.bucket not in (None, chosen.bucket):
        raise ConfigurationError(
            f"{base.workspace} is the workspace of {base.bucket}; name another for {uri} with "
            "--workspace"
        )
    root = (workspace or Path(base.workspace)).resolve()
    scoring = chosen.scoring if every is None else chosen.scoring.model_copy(
        update={"every": every}
    )  # fmt: skip
    chosen = chosen.model_copy(update={"workspace": str(root), "scoring": scoring})
    keep_apart(chosen)
    Workspace(root, chosen.trajectory).check_trajectory()
    file = make_folder(root) / "backfill.yaml"
    file.write_text(yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False))
    for name in list(os.environ):  # what they say is in the file, unless the arguments said more
        if name.startswith(("CKPTFUSE_BUCKET", "CKPTFUSE_CORPUS", "CKPTFUSE_WORKSPACE")):
            del os.environ[name]
    return load(file)


def _base(params: Path | None) -> tuple["Params", bool]:
    """What the arguments stand on: a file, if there is one."""
    from ckptfuse.params import PARAMS_FILE
    from ckptfuse.params_loading import default_params, load_params

    if params or os.environ.get("CKPTFUSE_PARAMS") or Path(PARAMS_FILE).is_file():
        return load_params(params), True
    return default_params(), False


def study(
    bucket: Annotated[str, typer.Argument(help="The trajectory: a folder or s3:// prefix.")],
    corpus: Annotated[
        list[str],
        typer.Option(help="NAME=PATH: text that sets weights; repeatable."),
    ],
    out_of_distribution: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: text that only the figures are of; repeatable."),
    ] = None,
    rules: Annotated[
        str | None, typer.Option(help="Such as uniform,ema(alpha=0.3)  [default: the cheap ones]")
    ] = None,
    windows: Annotated[
        str | None, typer.Option(help="Checkpoints in a window  [default: 4,8,16]")
    ] = None,
    positions: Annotated[
        int, typer.Option(min=1, help="Steps at which windows end, evenly spread.")
    ] = 4,
    decay_branch: Annotated[
        str | None, typer.Option(help="Bucket of this trajectory's decay branch.")
    ] = None,
    tokens_per_step: Annotated[
        float | None, typer.Option(help="Of training, where names do not tell: for compute saved.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="For scores and results  [default: in workspace/study]")
    ] = None,
    params: Annotated[
        Path | None, typer.Option("--params", help="params.yaml to take scoring and budgets from.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare rules and window lengths on a finished trajectory, by audit loss."""
    corpora = domains_of(corpus, "--corpus")
    outside = domains_of(out_of_distribution or [], "--out-of-distribution")
    sizes = _sizes(windows)
    if tokens_per_step is not None and not tokens_per_step > 0:
        raise ConfigurationError(f"--tokens-per-step {tokens_per_step:g}: more than 0 is expected")
    from ckptfuse import study as studying
    from ckptfuse.given import params_given, study_folder
    from ckptfuse.params_loading import default_params, keep_apart, load_params
    from ckptfuse.study.choices import DEFAULT_RULES

    choices = studying.parse_rules(rules or DEFAULT_RULES)
    base = load_params(params) if params else default_params()
    chosen = params_given(base, bucket, corpora, outside=outside)
    place = (folder or study_folder(str(chosen.bucket))).resolve()
    chosen = chosen.model_copy(update={"workspace": str(place)})
    keep_apart(chosen)
    plan = studying.Plan(choices, sizes, positions=positions, tokens_per_step=tokens_per_step)
    found = studying.run_study(
        chosen, plan, branch=decay_branch, say=lambda text: stderr.print(text, markup=False)
    )
    page = studying.write_study(found, place)
    print(studying.as_json(found) if as_json else page.read_text(), end="")
    stderr.print(f"the same, with figures: {page}", markup=False)


def _sizes(written: str | None) -> tuple[int, ...] | None:
    if written is None:
        return None
    try:
        sizes = tuple(sorted({int(size) for size in written.split(",")}))
    except ValueError:
        sizes = (0,)
    if sizes[0] < 2:
        raise ConfigurationError(f"--windows {written!r}: whole numbers from 2 on are expected")
    return sizes
