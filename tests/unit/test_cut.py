"""How streams become blocks: every token predicted once, whatever the layout."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ckptfuse.cut import Cut
from ckptfuse.errors import ConfigurationError


def owners_of(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


@given(count=st.integers(2, 200), length=st.integers(2, 30), data=st.data())
def test_packed_blocks_predict_every_token_after_the_first_once(
    count: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.none() | st.integers(1, length - 1))
    spans = Cut(length, stride=stride).spans(owners_of([count]))
    predicted = [t for start, end, read in spans for t in range(start + read, end)]
    assert predicted == list(range(1, count))
    assert all(end - start <= length and read >= 1 for start, end, read in spans)
    for (start, _, _), (following, _, read) in itertools.pairwise(spans):
        assert following - start == (stride or length - 1)
        assert read == length - (stride or length - 1)


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), length=st.integers(2, 20))
def test_rolling_blocks_are_the_windows_of_lm_evaluation_harness(
    sizes: list[int], length: int
) -> None:
    tokens = np.arange(100, 100 + sum(sizes))
    found = []
    for start, end, read in Cut(length, layout="rolling").spans(owners_of(sizes)):
        found.append((tokens[start : start + read].tolist(), tokens[start + read : end].tolist()))
    expected = []
    for document in np.split(tokens, np.cumsum(sizes)[:-1]):
        prefix, *rest = document.tolist()
        windows = get_rolling_token_windows(rest, prefix, length, context_len=1)
        expected += [make_disjoint_window(window) for window in windows]
    assert found == expected


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"stride": 8}, "1 to 7 are accepted"),
        ({"stride": 0}, "1 to 7 are accepted"),
        ({"layout": "rolling", "stride": 4}, "without a stride"),
        ({"layout": "rolling", "bos": "none"}, "bos 'document'"),
    ],
)
def test_a_cut_that_makes_no_sense_is_refused(choice: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Cut(8, **choice)  # type: ignore[arg-type]
