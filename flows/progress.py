"""How a merge goes on, for whoever waits: bytes, rate, time left; at the end what it took."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ckptfuse.merge.tally import Tally
from ckptfuse.peak import peak_memory


@contextmanager
def merging_bar(stderr: Console) -> Iterator[Callable[[Tally, int], None]]:
    """On a terminal, a bar over the bytes written; when it ends well, one line that sums it up."""
    columns = (
        TextColumn("merging"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    last = Tally()
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("bytes", total=None)

        def show(tally: Tally, size: int) -> None:
            nonlocal last
            last = tally
            bar.update(task, completed=tally.written, total=size)

        yield show
    if last.written:
        stderr.print(summary(last))


def summary(tally: Tally) -> str:
    """Bytes, the share of each kind of work in the threads' time, and peak memory."""
    work = tally.reading + tally.adding + tally.writing
    shares = {"read": tally.reading, "accumulate": tally.adding, "hash and write": tally.writing}
    split = ", ".join(f"{name} {seconds / work:.0%}" for name, seconds in shares.items())
    peak = peak_memory() / 2**20
    return (
        f"read {tally.read / 1e9:.2f} GB, wrote {tally.written / 1e9:.2f} GB in "
        f"{tally.seconds:.1f} s ({(tally.read + tally.written) / 1e9 / tally.seconds:.1f} GB/s): "
        f"{split}; peak memory {peak:.0f} MiB"
    )
