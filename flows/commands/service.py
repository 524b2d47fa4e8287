"""The commands of the service: they read params.yaml and work on its workspace."""

import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckptfuse.errors import CkptfuseError, ConfigurationError, CorpusError
from flows.commands.console import stderr, stdout

if TYPE_CHECKING:
    from ckptfuse.params import Params
    from flows.watch import Summary

ParamsOption = Annotated[
    Path | None, typer.Option("--params", help="params.yaml to read  [default: ./params.yaml]")
]
DECLINED = 3
PATIENCE = 30.0  # seconds; a server on a busy machine is slow to answer


def load(params: Path | None) -> tuple["Params", str]:
    """The parameters and their file, with the environment ready for Prefect and MLflow."""
    from ckptfuse.params import PARAMS_FILE
    from ckptfuse.params_loading import load_params
    from flows.environment import prepare

    loaded = load_params(params)
    prepare(Path(loaded.workspace))
    file = params or Path(os.environ.get("CKPTFUSE_PARAMS", PARAMS_FILE))
    return loaded, str(file.resolve())


def log_to_stderr() -> None:
    """Show what the steps log."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("ckptfuse")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)


def watch(
    params: ParamsOption = None,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
) -> None:
    """Watch the bucket: score, fuse, prove, version and register what is new."""
    loaded, file = load(params)
    preflight(loaded)
    log_to_stderr()
    stderr.print("looking (where there is something to do, Prefect takes a few seconds to start)")
    from flows.watch import look

    if once:
        summary = look(file)
        stdout.print(sentence(summary), markup=False)
        if summary.delayed or summary.held:
            raise typer.Exit(1)
        return
    _look_and_go_on(look, file, is_first=True)
    while True:
        time.sleep(loaded.watch.interval_seconds)
        _look_and_go_on(look, file)


def _look_and_go_on(look: Callable[[str], "Summary"], file: str, *, is_first: bool = False) -> None:
    """One scheduled look; a failure is told, and the next look tries again.

    What is configured wrongly is told at once, and not by a watch that was at work: parameters or
    text that are being edited are wrong for a moment.
    """
    try:
        summary = look(file)
    except Exception as error:  # the watch outlives a store, a server or a disk that fails
        in_the_making = isinstance(error, CorpusError)  # a file of text may be, at this moment
        if is_first and isinstance(error, ConfigurationError) and not in_the_making:
            raise
        stderr.print(f"this look failed, the next one tries again: {error}", markup=False)
        return
    if not summary.did_nothing:
        stderr.print(sentence(summary), markup=False)


def preflight(params: "Params") -> None:
    """Tell of a wrong bucket, corpus, rule or server before any work begins."""
    from ckptfuse.checkpoints import check_bucket_uri
    from ckptfuse.service import open_service
    from ckptfuse.store import open_store
    from flows.show import reading_bar

    with reading_bar(stderr) as read:
        open_service(params).scorer.prepare_corpus(read)
    open_store(check_bucket_uri(params.bucket)).list()
    check_prefect(os.environ.get("PREFECT_API_URL"))


def check_prefect(url: str | None) -> None:
    """Tell of a server that was named and is not there; without one Prefect starts its own."""
    if url is None:
        return
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=PATIENCE).close()  # noqa: S310 - the team's own
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in is between Prefect and it
    except OSError as error:
        raise CkptfuseError(
            f"Prefect's server at {url} does not answer ({error}); start it, or unset "
            "PREFECT_API_URL to use an embedded one"
        ) from error


def sentence(summary: "Summary") -> str:
    """What a look did."""
    if summary.busy:
        return "Another process is at work on this workspace; nothing done."
    waiting = ""
    if summary.incomplete:
        waiting = f" ({summary.incomplete} not complete yet: `ckptfuse status` says why)"
    said = []
    counts = (summary.scored, summary.quarantined, summary.skipped, summary.published)
    if any(counts) or summary.verdicts:
        said.append(
            f"{summary.scored} scored, {summary.quarantined} quarantined, {summary.skipped} "
            f"skipped, {summary.published} published{waiting}."
        )
    said += [f"step {v.step}: {v.verdict} ({v.reason})" for v in summary.verdicts]
    said += [
        f"champion: step {p.step} ({p.reason})" if p.promoted else f"step {p.step}: {p.reason}"
        for p in summary.settled
    ]
    if summary.held:
        last = summary.held[-1]
        said.append(
            f"{len(summary.held)} could not be read or scored, {last.name} among them "
            f"({last.reason}); the next look tries again."
        )
    if summary.delayed:
        said.append(f"Publication waits for the next run: {summary.delayed}")
    if not said:
        return f"Nothing to do: {summary.complete} checkpoints, all seen before{waiting}."
    return " ".join(said)


def fuse(
    params: ParamsOption = None,
    step: Annotated[
        int | None, typer.Option(help="Fuse the window that ends here  [default: the newest]")
    ] = None,
) -> None:
    """Fuse one window of checkpoints that are scored already."""
    loaded, file = load(params)
    preflight(loaded)
    log_to_stderr()
    from flows.fuse import fuse_step
    from flows.opening import start_server

    start_server()
    verdict = fuse_step(file, step)
    stdout.print(f"step {verdict.step}: {verdict.verdict}: {verdict.reason}", markup=False)
    if verdict.verdict == "declined":
        raise typer.Exit(DECLINED)


def veto(params: ParamsOption = None) -> None:
    """Hear the veto on the newest candidate: run promotion.veto.command where its answers lack."""
    loaded, _ = load(params)
    if not loaded.promotion.veto.command:
        raise ConfigurationError("promotion.veto.command is empty in params.yaml: there is no veto")
    log_to_stderr()
    from ckptfuse.published import find_publication
    from ckptfuse.service import open_service
    from ckptfuse.steps.veto import hear_veto, unheard
    from tasks.merged import bring_back

    service = open_service(loaded)
    for fusion in unheard(service):
        if service.weights_of(fusion) is None:  # of one that is champion again, say
            bring_back(service, fusion, find_publication(service, fusion).tag)
    heard = hear_veto(service)
    for record in heard:
        share = f"{record.correct} of {record.items} items correct"
        stdout.print(f"fusion {record.model[:12]}: {share}", markup=False)
    if heard:
        stderr.print("the next look of `ckptfuse watch` decides on the champion")
    else:
        stdout.print("Nothing to do: no candidate waits for its veto.")


def status(params: ParamsOption = None) -> None:
    """Show what is known of the trajectory: checkpoints, fusions, verdicts."""
    _ask_a_store_twice()
    loaded, _ = load(params)
    from ckptfuse.corpus.survey import near_duplicates_of
    from ckptfuse.overview import overview
    from ckptfuse.present import corpus_of_last_look
    from ckptfuse.service import open_service
    from flows.show import notes, table

    service = open_service(loaded)
    unread = corpus_of_last_look(service)
    seen = overview(service)
    stdout.print(table(seen))
    if unread is not None:
        stdout.print(unread, markup=False)
    for sentence in near_duplicates_of(seen.corpus) if seen.corpus else ():
        stdout.print(f"corpus, {sentence} (more: ckptfuse corpus)", markup=False)
    for line in notes(seen):
        stdout.print(line, markup=False)
    for item in seen.quarantined:
        stdout.print(f"quarantined {item.name}: {item.reason}", markup=False)


def _ask_a_store_twice() -> None:
    """Where records will do, nobody should wait for a store that is down: 18 s for five times."""
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "2")


def report(params: ParamsOption = None) -> None:
    """Write the report page and print its path."""
    _ask_a_store_twice()
    loaded, _ = load(params)
    from ckptfuse.present import corpus_of_last_look
    from ckptfuse.report.page import write_report
    from ckptfuse.service import open_service

    service = open_service(loaded)
    unread = corpus_of_last_look(service)
    if unread is not None:
        stderr.print(unread, markup=False)
    stdout.print(str(write_report(service)), markup=False)
