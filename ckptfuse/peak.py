"""The most memory that this process has held."""

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Resident bytes.

    Not ``ru_maxrss`` where Linux tells more: that is at least what the process held that started
    this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
