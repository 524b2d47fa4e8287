"""``python -m ckptfuse.job_forkserver``: forks a scoring job for each line of standard input.

It has loaded what every job needs, and has run nothing of it: no tensor was made and no GPU
touched, so that a fork is as good as a fresh process. Jobs run one at a time; they speak on
standard output, and after each one stands how it ended. When standard input ends, so does the
running job.
"""

import gc
import importlib
import os
import select
import signal
import sys
import traceback
from contextlib import suppress
from typing import Literal

from pydantic import BaseModel

from ckptfuse.processes import end_with_parent


class Job(BaseModel):
    """A job to fork: its request, where its standard error goes, and what surrounds it."""

    request: str
    stderr: str
    folder: str
    environment: dict[str, str]


class Ended(BaseModel):
    """The job of the last line has ended: with this status, or by this signal (negative)."""

    event: Literal["ended"] = "ended"
    status: int


def main() -> None:
    _load()
    requests = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with os.fdopen(requests, "rb", buffering=0) as lines:  # unbuffered: select must see them
        while line := lines.readline():
            job = Job.model_validate_json(line)
            child = os.fork()
            if child == 0:
                lines.close()
                _be(job)
            status = _wait(child, requests)
            # The job may have died in the middle of a line.
            print(f"\n{Ended(status=status).model_dump_json()}", flush=True)


def _load() -> None:
    """Import what a job needs. What that leaves behind stays: no use in looking it through."""
    gc.disable()
    # A library that asks, as it is imported, whether there are GPUs must not start CUDA here: a
    # fork could not start it again. This makes torch ask the driver's management library.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import ckptfuse.job
    import ckptfuse.modeling
    from ckptfuse.devices import visible_gpus

    ckptfuse.modeling.load_transformers()
    if visible_gpus():
        with suppress(Exception):  # what torch.compile needs there, 3 s of each job else
            importlib.import_module("torch._inductor.compile_fx")
    gc.freeze()
    gc.enable()


def _be(job: Job) -> None:
    """Turn this fork into the job. Does not return."""
    status = 1
    try:
        if end_with_parent is not None:
            end_with_parent()
        os.dup2(os.open(job.stderr, os.O_WRONLY), 2)
        os.chdir(job.folder)
        os.environ.clear()
        os.environ.update(job.environment)
        from ckptfuse import job as engine

        engine.main(job.request)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, requests: int) -> int:
    """The status of the child, which is killed if the requests end before it does."""
    ending = os.pidfd_open(child)
    try:
        ready, _, _ = select.select([ending, requests], [], [])
        if ending not in ready:  # nothing is asked while a job runs: the other side is gone
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(ending)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
