"""Digests: one text of a value, and one hash of a content however it arrives."""

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfuse.digests import LEAF_SIZE, TreeHasher, canonical_json, content_digest, digest

#: A little more than two leaves of bytes that do not repeat with the leaf.
LARGE = bytes(range(251)) * (2 * LEAF_SIZE // 251 + 5)


def streamed(data: bytes, cuts: list[int]) -> str:
    hasher = TreeHasher()
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in pairwise(places):
        hasher.update(memoryview(data)[start:end])
    return hasher.hexdigest()


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=8))
def test_a_stream_has_the_hash_of_its_bytes_however_it_is_cut(data: bytes, cuts: list[int]) -> None:
    assert streamed(data, cuts) == content_digest(data)


@pytest.mark.parametrize(
    "cuts",
    [[], [LEAF_SIZE], [LEAF_SIZE - 1, LEAF_SIZE + 1], [1, 2 * LEAF_SIZE], [LEAF_SIZE, LEAF_SIZE]],
)
def test_cuts_about_the_edges_of_leaves_change_nothing(cuts: list[int]) -> None:
    assert streamed(LARGE, cuts) == content_digest(LARGE)
    whole_leaves = LARGE[: 2 * LEAF_SIZE]
    assert streamed(whole_leaves, cuts) == content_digest(whole_leaves)


def test_the_tree_is_that_of_the_docstring() -> None:
    leaves = [LARGE[:LEAF_SIZE], LARGE[LEAF_SIZE : 2 * LEAF_SIZE], LARGE[2 * LEAF_SIZE :]]
    joined = b"".join(hashlib.sha256(leaf).digest() for leaf in leaves)
    expected = hashlib.sha256(b"ckptfuse-tree-1:8388608:" + joined).hexdigest()
    assert content_digest(LARGE) == expected


def test_a_hash_asked_for_twice_is_the_same_and_an_empty_file_has_one() -> None:
    hasher = TreeHasher()
    hasher.update(b"some")
    assert hasher.hexdigest() == hasher.hexdigest()
    assert TreeHasher().hexdigest() == content_digest(b"")
    assert content_digest(b"") != content_digest(b"\0")


def test_a_value_has_one_text_whatever_the_order_of_its_keys() -> None:
    assert canonical_json({"b": [1, 2.5], "a": None}) == b'{"a":null,"b":[1,2.5]}'
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    assert digest([1, 2]) != digest([2, 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_without_a_number_has_no_digest(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        digest({"loss": value})
