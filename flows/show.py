"""What the command line prints: tables for people, JSON for programs."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from ckptfuse.corpus.survey import EXAMPLES
from ckptfuse.inspection import Inspection
from ckptfuse.notes import explain
from ckptfuse.once import HandScore
from ckptfuse.overview import Overview
from ckptfuse.phases import phase_notes
from ckptfuse.present import present_notes
from ckptfuse.protocol import Event, Progress

_STYLES = {
    "champion": "bold green",
    "candidate": "cyan",
    "published": "green",
    "retired": "dim",
    "declined": "yellow",
    "skipped": "dim",
}
_COUNTS = ("documents", "bytes", "tokens")


def _number(value: float | None, signed: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def table(seen: Overview, title: str = "Loss on report text, nats per token") -> Table:
    """One row a checkpoint, as it landed."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    drawn.add_column("step", justify="right")
    for heading in ("raw", "best single", "merged", "gain"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    drawn.add_column("verdict", no_wrap=True)
    for row in seen.rows:
        style = _STYLES.get(row.verdict, "")
        drawn.add_row(
            str(row.step),
            _number(row.loss),
            _number(row.best_single),
            _number(row.fused),
            _number(row.gain, signed=True),
            (f"[{style}]{row.verdict}[/{style}]" if style else row.verdict)
            + (" [red]spike[/red]" if row.spike is not None else ""),
        )
    return drawn


def notes(seen: Overview) -> list[str]:
    """What there is to say under the table: spikes, the newest weights, and what waits."""
    said = [
        f"step {row.step} is a spike: {row.spike:.4f} nats above the trend on selection text"
        for row in seen.rows
        if row.spike is not None
    ]
    plans = [row.plan for row in seen.rows if row.plan is not None]
    if plans:
        said += [f"weights at step {plans[-1].step}: {line}" for line in explain(plans[-1])]
    return said + phase_notes(seen.rows) + present_notes(seen)


@contextmanager
def scoring_bar(stderr: Console) -> Iterator[Callable[[Event], None]]:
    """On a terminal, a bar with the time left; fed by the events of a scoring job."""
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("blocks", total=None)

        def show(event: Event) -> None:
            if isinstance(event, Progress):
                bar.update(task, completed=event.done, total=event.total)

        yield show


def print_score(
    result: HandScore, checkpoint: str, *, stdout: Console, stderr: Console, as_json: bool
) -> None:
    """Per domain: loss, standard error, perplexity, bits per byte, tokens."""
    if as_json:
        values = {
            "checkpoint": checkpoint,
            "fingerprint": result.fingerprint,
            "split": result.split,
            "block_length": result.block_length,
            "dtype": result.dtype,
            "device": result.device,
            "domains": {name: score.model_dump() for name, score in result.domains.items()},
        }
        print(json.dumps(values, indent=2))
        return
    drawn = Table()
    for heading in ("domain", "loss", "std. error", "perplexity", "bits/byte", "tokens", "docs"):
        drawn.add_column(heading, justify="left" if heading == "domain" else "right")
    for name, score in result.domains.items():
        drawn.add_row(
            name,
            _number(score.loss),
            _number(score.standard_error) or "-",
            _number(score.perplexity) or "-",
            _number(score.bits_per_byte) or "-",
            f"{score.tokens:,}",
            f"{score.documents:,}",
        )
    stdout.print(drawn)
    stderr.print(
        f"{result.split} text, blocks of {result.block_length} tokens, {result.dtype} on "
        f"{result.device}; loss in nats per token"
    )


@contextmanager
def reading_bar(stderr: Console) -> Iterator[Callable[[int, int], None]]:
    """On a terminal, a bar over the bytes of the corpus's files."""
    columns = (
        TextColumn("reading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("bytes", total=None)
        yield lambda size, of: bar.update(task, advance=size, total=of)


def print_corpus(seen: Inspection, *, stdout: Console, stderr: Console, as_json: bool) -> None:
    """Per domain and split: documents, bytes and tokens drawn, and near-duplicates elsewhere."""
    if as_json:
        values = {
            "corpus": seen.contents.corpus,
            "sources": {name: asdict(source) for name, source in seen.sources.items()},
            "domains": seen.contents.model_dump()["domains"],
            "tokens": seen.tokens,
            "examples": seen.contents.model_dump()["examples"],
        }
        print(json.dumps(values, indent=2))
        return
    drawn = Table()
    for heading in ("domain", "split", "documents", "bytes", "tokens", "near-duplicates in"):
        drawn.add_column(heading, justify="right" if heading in _COUNTS else "left")
    for name, splits in seen.contents.domains.items():
        for split, held in splits.items():
            drawn.add_row(
                name,
                split,
                f"{held.documents:,}",
                f"{held.bytes:,}",
                f"{seen.tokens[name][split]:,}" if seen.tokens is not None else "",  # type: ignore[index]
                ", ".join(f"{other}: {n}" for other, n in held.near_duplicates.items()),
            )
    stdout.print(drawn)
    for pair in seen.contents.examples[:EXAMPLES]:
        stdout.print(f"{pair.similarity:.0%} alike:", markup=False)
        for place in (pair.one, pair.other):
            where = f"{place.domain} {place.split} {place.digest[:12]}"
            stdout.print(f"  {where}  {place.beginning}", markup=False)
    for name, source in seen.sources.items():
        stderr.print(
            f"{name}: {source.documents:,} documents of {source.bytes / 1e6:,.1f} MB in "
            f"{source.files:,} files, {source.documents - source.distinct:,} of them copies",
            markup=False,
        )
