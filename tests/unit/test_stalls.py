"""When a trainer has fallen silent."""

import pytest

from ckptfuse.stalls import silence
from tests.helpers import checkpoint_record


def test_three_times_the_usual_pause_is_silence() -> None:
    known = [checkpoint_record(n, modified=float(n)) for n in range(0, 1000, 100)]
    assert silence(known, now=1190.0) is None
    assert silence(known, now=1210.0) == (310.0, 100.0)


def test_what_is_usual_is_what_was_lately_and_one_long_pause_does_not_change_it() -> None:
    slow = [checkpoint_record(n, modified=1000.0 * n) for n in range(5)]
    fast = [checkpoint_record(10 + n, modified=9000.0 + 10 * n) for n in range(12)]
    assert silence([*slow, *fast], now=9150.0) == (40.0, 10.0)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_of_too_few_checkpoints_nothing_is_said(count: int) -> None:
    known = [checkpoint_record(n, modified=float(n)) for n in range(count)]
    assert silence(known, now=1e9) is None
