"""Memory of the C library's heap, kept for the next tensor instead of given back.

A forward pass on a CPU makes and frees the same tensors again and again. By default glibc gives
those of several MiB back to the system each time, which then fills new pages with zeros, on one
core while the others wait.
"""

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """For the rest of this process. A C library without ``mallopt`` is left as it is."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**30) or mallopt(_MMAP_THRESHOLD, 2**25)  # the most of old ones
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
