"""The command line. Results go to standard output; progress, notes and errors to standard error.

Exit status: 0 done or nothing to do, 1 fault, 2 usage or configuration, 3 declined. Heavy
imports stay inside the commands that need them, so that help and errors come at once.
"""

import errno
import signal
import sys
from pathlib import Path

import typer

from ckptfuse.errors import CkptfuseError
from flows.commands import (
    by_hand,
    finished,
    monitoring,
    operations,
    published,
    service,
    stages,
)
from flows.commands.console import stderr

#: What a disk or its owner says, and no fault of the program.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fuse the checkpoints of a running pretraining into better models, unattended.",
)
app.command()(service.watch)
app.command()(service.fuse)
app.command()(service.veto)
app.command()(service.status)
app.command()(service.report)
app.command()(operations.deploy)
app.command()(operations.notify)
app.command()(monitoring.doctor)
app.command()(monitoring.metrics)
app.command()(published.promote)
app.command()(published.rollback)
app.command()(published.verify)
app.command()(published.prune)
app.command()(finished.backfill)
app.command()(finished.study)
app.command()(by_hand.score)
app.command()(by_hand.corpus)
app.command()(by_hand.merge)
app.add_typer(stages.stage, name="stage")


@app.command()
def demo() -> None:
    """Pretrain a small model on this machine's text while the service watches it (./workspace)."""
    from flows.demo.run import run_demo
    from flows.environment import prepare

    prepare(Path("workspace"))
    run_demo()


def main() -> None:
    """Run a command; expected failures become one message and an exit status."""
    # Python's default would end at once and leave Prefect's embedded server running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except CkptfuseError as error:
        stderr.print(f"ckptfuse: {error}", markup=False)
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        stderr.print(f"ckptfuse: {error}", markup=False)
        sys.exit(CkptfuseError.exit_status)


if __name__ == "__main__":
    main()
