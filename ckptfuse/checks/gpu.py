"""The GPUs: does torch see what the driver shows, does it compute there, does a model fit?"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptfuse.checks.check import Check, failed, ok, warning
from ckptfuse.devices import VISIBLE, visible_gpus
from ckptfuse.errors import in_a_line
from ckptfuse.params import ScoringParams

NAME = "GPU"
_KERNELS = "TRITON_CACHE_DIR"
_DRIVER = Path("/proc/driver/nvidia/version")
#: Of a model's weights, for what scoring needs beside them.
_MARGIN = 1.2


def gpu(params: ScoringParams, model: int | None, folder: Path | None = None) -> Check:
    """``model``: bytes of a checkpoint's weights, None where none is there to tell.

    ``folder``: one where the service writes, for what is compiled; None: that of temporary files.
    """
    if params.device == "cpu":
        return ok(NAME, "none is needed: scoring.device is cpu")
    if not visible_gpus():
        said = f"this machine shows none (/dev/nvidia*, {VISIBLE})"
        if params.device == "auto":
            return warning(
                NAME,
                f"{said}: scoring runs on the CPU",
                "set scoring.device: cpu if that is meant; in a container pass the GPU in",
            )
        return failed(
            NAME,
            f"{said}, and scoring.device is cuda",
            "run this on the machine that scores; in a container pass the GPU in (--gpus all, "
            "nvidia.com/gpu)",
        )
    return _seen_by_torch(params, model, folder)


def _seen_by_torch(params: ScoringParams, model: int | None, folder: Path | None) -> Check:
    import torch

    driver = driver_version()
    if torch.version.cuda is None:
        return failed(
            NAME,
            f"torch {torch.__version__} is built for CPUs, and the driver ({driver}) shows GPUs",
            "install torch's ordinary build, of the version in constraints.txt",
        )
    if not torch.cuda.is_available():
        return failed(
            NAME,
            f"torch {torch.__version__} wants CUDA {torch.version.cuda} and gets none from the "
            f"driver ({driver})",
            "update the driver, or check that the container may use the device (nvidia-smi)",
        )
    count = torch.cuda.device_count()
    for index in range(count):
        problem = _does_not_compute(index)
        if problem is not None:
            return failed(
                NAME,
                f"GPU {index} ({torch.cuda.get_device_name(index)}) does not compute: {problem}",
                "see dmesg for Xid errors, and whether this build of torch knows the GPU's "
                "generation",
            )
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    said = f"{count} x {names}, {memory / 1e9:.0f} GB each, driver {driver}; torch computed there"
    check = _enough(said, params.gpus_per_job, count, memory, model)
    return _compiles(check, folder) if check.state == "ok" else check


def _does_not_compute(index: int) -> str | None:
    """What goes wrong with a product of two matrices that is known, if anything does."""
    import torch

    try:
        ones = torch.ones(64, 64, dtype=torch.bfloat16, device=f"cuda:{index}")
        found = float((ones @ ones).float().sum())
    except RuntimeError as error:
        return str(error)
    return None if found == 64.0**3 else f"{found} came out where {64.0**3} is right"


def _compiles(check: Check, folder: Path | None) -> Check:
    """This check, or a warning that Triton makes no kernel here."""
    from ckptfuse.log_sum_exp import load_kernel

    try:
        with tempfile.TemporaryDirectory(dir=folder) as kernels, _variable(_KERNELS, kernels):
            load_kernel()
    except Exception as error:  # a compiler and a driver may fail in any way
        return warning(
            NAME,
            f"{check.said}, but no kernel can be compiled ({in_a_line(error)}): scoring takes up "
            "to two fifths longer",
            "install a C compiler and Python's headers (Debian: apt-get install gcc python3-dev), "
            "and let files be run where the workspace lies",
        )
    return check


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _enough(said: str, per_job: int, count: int, memory: int, model: int | None) -> Check:
    if count < per_job:
        return failed(NAME, f"{said}; scoring.gpus_per_job is {per_job}", "lower it, or add GPUs")
    if model and model * _MARGIN > memory * per_job:
        return warning(
            NAME,
            f"{said}; a checkpoint of {model / 1e9:.1f} GB hardly fits into {per_job}",
            "raise scoring.gpus_per_job",
        )
    return ok(NAME, said)


def driver_version() -> str:
    """The driver's version, from the kernel module."""
    try:
        first = _DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError):
        return "of unknown version"
    words = first.partition("Kernel Module")[2].split()
    return next((word for word in words if word[0].isdigit()), first)
