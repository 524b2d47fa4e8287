"""The command line. Results go to standard output; progress, notes and errors to standard error.

Exit status: 0 done or nothing to do, 1 fault, 2 usage or configuration, 3 declined. Heavy
imports stay inside the commands that need them, so that help and errors come at once.
"""

import logging
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ckptfuse.errors import CkptfuseError, ConfigurationError

if TYPE_CHECKING:
    from ckptfuse.params import Params
    from flows.watch import Summary

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fuse the checkpoints of a running pretraining into better models, unattended.",
)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)
stdout = Console(highlight=False, soft_wrap=True)

ParamsOption = Annotated[
    Path | None, typer.Option("--params", help="params.yaml to read  [default: ./params.yaml]")
]
DECLINED = 3
#: Of the environment variables that set the same caps for the service (params.yaml: reading).
READING = "CKPTFUSE_READING__"


def main() -> None:
    """Run a command; expected failures become one message and an exit status."""
    # Python's default would end at once and leave Prefect's embedded server running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except CkptfuseError as error:
        stderr.print(f"ckptfuse: {error}", markup=False)
        sys.exit(error.exit_status)


def _load(params: Path | None) -> tuple["Params", str]:
    """The parameters and their file, with the environment ready for Prefect and MLflow."""
    from ckptfuse.params import PARAMS_FILE, load_params
    from flows.environment import prepare

    loaded = load_params(params)
    prepare(Path(loaded.workspace))
    file = params or Path(os.environ.get("CKPTFUSE_PARAMS", PARAMS_FILE))
    return loaded, str(file.resolve())


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("ckptfuse")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)


@app.command()
def watch(
    params: ParamsOption = None,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
) -> None:
    """Watch the bucket: score, fuse, prove, version and register what is new."""
    loaded, file = _load(params)
    _preflight(loaded)
    _log_to_stderr()
    stderr.print("starting (the first look takes a few seconds: Prefect's server starts)")
    from flows.watch import watch as watch_flow

    if once:
        summary = watch_flow(file)
        stdout.print(_sentence(summary), markup=False)
        if summary.delayed:
            raise typer.Exit(1)
        return
    while True:
        _look_and_go_on(watch_flow, file)
        time.sleep(loaded.watch.interval_seconds)


def _look_and_go_on(watch_flow: object, file: str) -> None:
    """One scheduled look; a failure is told, and the next look tries again."""
    try:
        summary: Summary = watch_flow(file)  # type: ignore[operator]
    except ConfigurationError:
        raise
    except Exception as error:  # the watch outlives a store, a server or a disk that fails
        stderr.print(f"this look failed, the next one tries again: {error}", markup=False)
        return
    if not summary.did_nothing:
        stderr.print(_sentence(summary), markup=False)


def _preflight(params: "Params") -> None:
    """Tell of a wrong bucket, corpus, rule or server before any work begins."""
    from ckptfuse.checkpoints import check_bucket_uri
    from ckptfuse.service import open_service
    from ckptfuse.store import open_store
    from flows.show import reading_bar

    with reading_bar(stderr) as read:
        open_service(params).scorer.prepare_corpus(read)
    open_store(check_bucket_uri(params.bucket)).list()
    _check_prefect(os.environ.get("PREFECT_API_URL"))


def _check_prefect(url: str | None) -> None:
    """Tell of a server that was named and is not there; without one Prefect starts its own."""
    if url is None:
        return
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=10).close()  # noqa: S310 - the team's own
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in is between Prefect and it
    except OSError as error:
        raise CkptfuseError(
            f"Prefect's server at {url} does not answer ({error}); start it, or unset "
            "PREFECT_API_URL to use an embedded one"
        ) from error


def _sentence(summary: "Summary") -> str:
    if summary.busy:
        return "Another process is at work on this workspace; nothing done."
    waiting = f" ({summary.incomplete} not complete yet)" if summary.incomplete else ""
    if summary.delayed:
        return f"Publication waits for the next run: {summary.delayed}"
    if summary.did_nothing:
        held = f"; {len(summary.held)} could not be read" if summary.held else ""
        return f"Nothing to do: {summary.complete} checkpoints, all seen before{waiting}{held}."
    verdicts = [f"step {v.step}: {v.verdict} ({v.reason})" for v in summary.verdicts]
    return (
        f"{summary.scored} scored, {summary.quarantined} quarantined, {summary.skipped} skipped, "
        f"{summary.published} published{waiting}. " + " ".join(verdicts)
    ).strip()


@app.command()
def fuse(
    params: ParamsOption = None,
    step: Annotated[
        int | None, typer.Option(help="Fuse the window that ends here  [default: the newest]")
    ] = None,
) -> None:
    """Fuse one window of checkpoints that are scored already."""
    loaded, file = _load(params)
    _preflight(loaded)
    _log_to_stderr()
    from flows.fuse import fuse_step

    verdict = fuse_step(file, step)
    stdout.print(f"step {verdict.step}: {verdict.verdict}: {verdict.reason}", markup=False)
    if verdict.verdict == "declined":
        raise typer.Exit(DECLINED)


@app.command()
def backfill(params: ParamsOption = None) -> None:
    """Replay a finished trajectory: fuse and judge every window, oldest first."""
    loaded, file = _load(params)
    _preflight(loaded)
    _log_to_stderr()
    from flows.backfill import backfill as backfill_flow

    stdout.print(_sentence(backfill_flow(file)), markup=False)


@app.command()
def status(params: ParamsOption = None) -> None:
    """Show what is known of the trajectory: checkpoints, fusions, verdicts."""
    loaded, _ = _load(params)
    from ckptfuse.corpus.survey import near_duplicates_of
    from ckptfuse.overview import overview
    from ckptfuse.service import open_service
    from flows.show import notes, table

    seen = overview(open_service(loaded))
    stdout.print(table(seen))
    for sentence in near_duplicates_of(seen.corpus) if seen.corpus else ():
        stdout.print(f"corpus, {sentence} (more: ckptfuse corpus)", markup=False)
    for line in notes(seen):
        stdout.print(line, markup=False)
    for item in seen.quarantined:
        stdout.print(f"quarantined {item.name}: {item.reason}", markup=False)


@app.command()
def report(params: ParamsOption = None) -> None:
    """Write the report page and print its path."""
    loaded, _ = _load(params)
    from ckptfuse.report.page import write_report
    from ckptfuse.service import open_service

    stdout.print(str(write_report(open_service(loaded))), markup=False)


@app.command()
def score(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder or s3:// prefix.")],
    corpus: Annotated[
        list[str],
        typer.Option(help="NAME=PATH: JSON lines, text, Parquet, or a folder of them; repeatable."),
    ],
    split: Annotated[
        str | None, typer.Option(help="selection, audit or report  [default: all the text]")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with a tokenizer  [default: the checkpoint]")
    ] = None,
    block_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of context  [default: up to 1024]")
    ] = None,
    bos: Annotated[str, typer.Option(help="document: one before each document; or none")] = (
        "document"
    ),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    converter: Annotated[
        str | None, typer.Option(help="package.module:function, for a trainer's own layout.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder with config.json and tokenizer, where the checkpoint has none."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score one checkpoint on text files: loss, perplexity, bits per byte."""
    corpora = dict(_pair(item, "--corpus", "NAME=PATH") for item in corpus)
    _check_choice("--split", split, (None, "selection", "audit", "report"))
    _check_choice("--bos", bos, ("document", "none"))
    _check_choice("--device", device, ("auto", "cpu", "cuda"))
    from ckptfuse.once import score_once
    from flows.show import print_score, scoring_bar

    with scoring_bar(stderr) as progress:
        result = score_once(
            checkpoint,
            corpora,
            split=split,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            block_length=block_length,
            bos=bos,
            device=device,
            converter=converter,
            model=model,
            progress=progress,
        )
    print_score(result, checkpoint, stdout=stdout, stderr=stderr, as_json=as_json)


@app.command()
def corpus(
    domains: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=PATH", help="Domains  [default: those of params.yaml]"),
    ] = None,
    field: Annotated[str, typer.Option(help="Of NAME=PATH: the field or column of the text.")] = (
        "text"
    ),
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with a tokenizer, to count the tokens scored.")
    ] = None,
    params: ParamsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look through target text: documents, tokens, copies, near-duplicates across splits."""
    from ckptfuse.inspection import inspect_corpus
    from ckptfuse.params import CorpusParams, load_params
    from flows.show import print_corpus, reading_bar

    if domains:
        pairs = dict(_pair(item, "domain", "NAME=PATH") for item in domains)
        chosen = CorpusParams.of(pairs, field=field)
    else:
        chosen = load_params(params).corpus
    with reading_bar(stderr) as read:
        seen = inspect_corpus(chosen, tokenizer=tokenizer or chosen.tokenizer, read=read)
    print_corpus(seen, stdout=stdout, stderr=stderr, as_json=as_json)


@app.command()
def merge(
    out: Annotated[str, typer.Argument(help="New folder or s3:// prefix.")],
    inputs: Annotated[list[str], typer.Argument(metavar="CHECKPOINT=WEIGHT...")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16  [default: as the inputs]")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="safetensors (a Hugging Face folder) or dcp (a distributed checkpoint to resume "
            "from)  [default: as the inputs]"
        ),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="moments in a dcp: the newest's, their average, or none of them")
    ] = "newest",
    copy: Annotated[
        list[str] | None, typer.Option(help="Tensors (* for any characters) to copy, not merge.")
    ] = None,
    master: Annotated[
        list[str] | None, typer.Option(help="fp32 weights in the optimizer (* for any characters).")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse inputs whose copied tensors differ.")
    ] = False,
    megabytes_per_second: Annotated[
        float | None,
        typer.Option(envvar=f"{READING}MEGABYTES_PER_SECOND", help="Read no faster than this."),
    ] = None,
    requests_per_second: Annotated[
        float | None,
        typer.Option(envvar=f"{READING}REQUESTS_PER_SECOND", help="Start no more reads than this."),
    ] = None,
) -> None:
    """Merge checkpoints, oldest first; whatever is not merged is the last one's."""
    pairs = [_pair(item, "input", "CHECKPOINT=WEIGHT") for item in inputs]
    try:
        weights = [float(weight) for _, weight in pairs]
    except ValueError as error:
        raise ConfigurationError(f"a weight is no number: {error}") from error
    _check_choice("--dtype", dtype, (None, "float32", "bfloat16", "float16"))
    _check_choice("--form", form, (None, "safetensors", "dcp"))
    _check_choice("--optimizer", optimizer, ("newest", "average", "none"))
    if abs(sum(weights) - 1) > 1e-6:
        stderr.print(f"note: the weights sum to {sum(weights):g}; they are used as given")
    _cap_reads(megabytes_per_second, requests_per_second)
    from ckptfuse.fusion import Recipe
    from ckptfuse.merge.once import form_of, merge_once
    from flows.progress import merging_bar

    with merging_bar(stderr) as progress:
        spec, contents = merge_once(
            out,
            [uri for uri, _ in pairs],
            weights,
            recipe=Recipe(
                dtype=dtype,
                copied=tuple(copy or ()),
                form=form or form_of(pairs[-1][0]),  # type: ignore[arg-type]
                optimizer=optimizer,  # type: ignore[arg-type]
                masters=tuple(master or ()),
                strict=strict,
            ),
            progress=progress,
        )
    size = sum(size for size, _ in contents.values())
    stderr.print(f"{len(contents)} files, {size / 1e6:.1f} MB, fusion {spec.id[:16]}")
    stdout.print(out, markup=False)


def _check_choice(option: str, value: str | None, accepted: tuple[str | None, ...]) -> None:
    if value not in accepted:
        names = [name for name in accepted if name is not None]
        raise ConfigurationError(
            f"{option} {value!r}: {', '.join(names[:-1])} or {names[-1]} is expected"
        )


def _cap_reads(megabytes: float | None, requests: float | None) -> None:
    for name, value in {"megabytes": megabytes, "requests": requests}.items():
        if value is not None and not value > 0:
            raise ConfigurationError(f"--{name}-per-second {value:g}: more than 0 is expected")
    from ckptfuse.store import throttle

    throttle.configure(throttle.Limits(megabytes, requests))


def _pair(text: str, what: str, form: str) -> tuple[str, str]:
    """Split at the last ``=`` for weights, so that URIs may hold one; NAME=FILE at the first."""
    left, equals, right = text.rpartition("=") if what == "input" else text.partition("=")
    if not (left and equals and right):
        raise ConfigurationError(f"{what} {text!r}: {form} is expected")
    return left, right


@app.command()
def demo() -> None:
    """Pretrain a small model on this machine's text while the service watches it (./workspace)."""
    from flows.demo.run import run_demo
    from flows.environment import prepare

    prepare(Path("workspace"))
    run_demo()


stage = typer.Typer(hidden=True, no_args_is_help=True, help="The stages of dvc.yaml.")
app.add_typer(stage, name="stage")


@stage.command("score")
def stage_score(key: str) -> None:
    """Score the checkpoint that window.yaml calls KEY."""
    from tasks.stages import score

    score(key)


@stage.command("decide")
def stage_decide() -> None:
    """Derive the weights again and pass the pinned ones on."""
    from tasks.stages import decide

    decide()


@stage.command("fuse")
def stage_fuse() -> None:
    """Merge with the pinned weights."""
    from tasks.stages import fuse

    fuse()


@stage.command("evaluate")
def stage_evaluate() -> None:
    """Judge the merge and write its figures."""
    from tasks.stages import evaluate_stage

    evaluate_stage()


if __name__ == "__main__":
    main()
