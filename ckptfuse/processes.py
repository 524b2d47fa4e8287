"""Child processes that end with us: a killed service must leave no one behind who still writes."""

import ctypes
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAST = 2_000  # bytes of standard error: a traceback of some depth


def _linux() -> Callable[[], None]:
    libc = ctypes.CDLL(None)  # loaded here: little may be done between fork and exec

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return end_with_parent


def last_words(errors: Path) -> str:
    """The end of what a process wrote to its standard error."""
    with errors.open("rb") as said:
        said.seek(max(errors.stat().st_size - _LAST, 0))
        return said.read().decode(errors="replace").strip()


#: For ``preexec_fn``: the kernel kills the child when the thread that started it ends, however
#: that ends. Only Linux can do that; elsewhere a child of a killed service runs on to its end.
end_with_parent: Callable[[], None] | None = _linux() if sys.platform == "linux" else None
