"""What the command line prints: tables for people, JSON for programs."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ckptfuse.once import HandScore
from ckptfuse.overview import Overview
from ckptfuse.protocol import Event, Progress

_STYLES = {"champion": "bold green", "published": "green", "declined": "yellow", "skipped": "dim"}


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
            f"[{style}]{row.verdict}[/{style}]" if style else row.verdict,
        )
    return drawn


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
