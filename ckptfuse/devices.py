"""The GPUs that scoring jobs share: each job has its own, and each GPU one job.

Two jobs on one GPU would both fail for want of memory. So whoever uses one holds a lock of the host
(``flock`` in ``LOCKS``): it binds every process of ckptfuse on the machine, of whatever service or
user, and ends with the process that holds it. A CPU is shared, as it always is.
"""

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from ckptfuse.errors import ConfigurationError

VISIBLE = "CUDA_VISIBLE_DEVICES"
#: One folder for all users, whatever their TMPDIR.
LOCKS = Path("/tmp/ckptfuse-devices")
#: As CUDA reads the list, up to the first that is none: -1, and what Slurm sets without GPUs.
_IS_GPU = re.compile(r"\d+|GPU-.+|MIG-.+").fullmatch
#: A folder for each, by its place on the bus, in which order it is numbered.
_GPUS = Path("/proc/driver/nvidia/gpus")
_UUID = re.compile(r"^GPU UUID:\s*(GPU-[0-9a-f-]+)$", re.MULTILINE).search
_PAUSE = 0.5  # seconds between two tries

log = logging.getLogger("ckptfuse")


def visible_gpus() -> list[str]:
    """Those that this process may use: asked of the driver's files, since torch loads slowly."""
    chosen = os.environ.get(VISIBLE)
    if chosen is not None:
        return list(takewhile(_IS_GPU, (gpu.strip() for gpu in chosen.split(","))))
    # CUDA counts from 0 what it finds, whatever the number of the file: a container may have one.
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def slots(device_class: str, gpus_per_job: int) -> list[dict[str, str]]:
    """One environment for each job that may run at once; a CPU has one job.

    Raises ConfigurationError when there are fewer GPUs than one job is to have.
    """
    if device_class == "cpu":
        return [{}]
    gpus = visible_gpus()
    count = len(gpus) // gpus_per_job
    if not count:
        raise ConfigurationError(
            f"scoring.gpus_per_job is {gpus_per_job}, and this machine shows {len(gpus)} GPUs "
            f"({VISIBLE}={os.environ.get(VISIBLE, 'unset')})"
        )
    return [
        {VISIBLE: ",".join(gpus[slot * gpus_per_job : (slot + 1) * gpus_per_job])}
        for slot in range(count)
    ]


@contextmanager
def claim(wanted: Sequence[Mapping[str, str]], most: int) -> Iterator[list[Mapping[str, str]]]:
    """Some of these slots to ourselves: at least one, which is waited for, and at most ``most``."""
    with ExitStack() as held:
        free = _free(wanted, most, held)
        if not free:
            names = "; ".join(slot[VISIBLE] for slot in wanted)
            log.info("waiting for a GPU: other processes of ckptfuse hold all of them (%s)", names)
        while not free:
            time.sleep(_PAUSE)
            free = _free(wanted, most, held)
        yield free


def _free(
    wanted: Sequence[Mapping[str, str]], most: int, held: ExitStack
) -> list[Mapping[str, str]]:
    found: list[Mapping[str, str]] = []
    for slot in wanted:
        if len(found) == most:
            break
        gpus = [gpu for gpu in slot.get(VISIBLE, "").split(",") if gpu]
        with ExitStack() as locks:
            try:
                for name in sorted(set().union(*map(_names, gpus))):
                    locks.enter_context(_lock(name).acquire(timeout=0))
            except Timeout:
                continue
            held.push(locks.pop_all())
            found.append(slot)
    return found


def _names(gpu: str) -> set[str]:
    """What a GPU is locked by: as it is spelled here, and its UUID, which others may have for it.

    By both, since the driver may not tell the UUID before the GPU is first used.
    """
    uuids = _uuids()
    if gpu.isdecimal():
        return {gpu, *filter(None, uuids[int(gpu) :][:1])}
    return {gpu, *(uuid for uuid in uuids if uuid.startswith(gpu))}  # CUDA takes its beginning


def _uuids() -> list[str]:
    """Of all GPUs that the driver has, in the order of their numbers; empty where it is unknown."""
    try:
        about = [file.read_text() for file in sorted(_GPUS.glob("*/information"))]
    except OSError:  # not for this user to read
        return []
    return [found[1] if (found := _UUID(text)) else "" for text in about]


def _lock(gpu: str) -> FileLock:
    if not LOCKS.is_dir():
        LOCKS.mkdir(exist_ok=True)
        LOCKS.chmod(0o1777)
    name = gpu.replace("/", "-")  # MIG devices have names with slashes
    return FileLock(LOCKS / f"{name}.lock", mode=0o666)
