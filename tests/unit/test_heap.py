"""Freed memory that is kept: the next tensors come without new pages from the system."""

import resource
from multiprocessing import get_context

from ckptfuse.heap import keep_freed_memory


def test_memory_that_was_freed_is_used_again() -> None:
    with get_context("spawn").Pool(1) as process:
        by_default, kept = process.apply(_new_pages_before_and_after)
    assert by_default > 10_000
    assert kept < 100


def _new_pages_before_and_after() -> tuple[int, int]:
    _make_and_free()
    by_default = _new_pages_of_making()
    keep_freed_memory()
    _make_and_free()
    return by_default, _new_pages_of_making()


def _new_pages_of_making() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    _make_and_free()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _make_and_free() -> None:
    """Four times 12 MiB, of 3,072 pages each."""
    made = [bytearray(12 * 2**20) for _ in range(4)]
    for one in made:
        one[::4096] = b"\1" * len(one[::4096])
