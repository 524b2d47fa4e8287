"""The GPUs that scoring jobs share: each job has its own, and each GPU one job."""

import os
from pathlib import Path

from ckptfuse.errors import ConfigurationError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """Those that this process may use: asked of the driver's files, since torch loads slowly."""
    chosen = os.environ.get(VISIBLE)
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip()]
    numbers = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    return sorted(numbers, key=int)


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
