"""The header parser meets files of every kind: ours are its only errors, its places are true."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save, save_file

from ckptfuse.errors import DamagedCheckpoint, IncompleteCheckpoint
from ckptfuse.formats.safetensors import (
    MAX_HEADER_SIZE,
    Header,
    encode_header,
    read_header,
    read_index,
)
from ckptfuse.store import FolderStore

FILE = "model.safetensors"
TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 5),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "mask": torch.tensor([True, False, True]),
}
VALID = save(TENSORS, metadata={"format": "pt"})

fuzzed = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def parse(folder: Path, data: bytes) -> Header:
    (folder / FILE).write_bytes(data)
    return read_header(FolderStore(folder), FILE, len(data))


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_every_tensor_is_where_upstream_reads_it(tmp_path: Path) -> None:
    header = parse(tmp_path, VALID)
    assert {t.name for t in header.tensors} == set(TENSORS)
    assert header.metadata == {"format": "pt"}
    for tensor in header.tensors:
        (piece,) = tensor.pieces
        stored = VALID[piece.start : piece.start + tensor.length]
        expected = TENSORS[tensor.name]
        assert tensor.shape == tuple(expected.shape)
        assert stored == expected.flatten().view(torch.uint8).numpy().tobytes()


def test_upstream_reads_what_we_encode(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    start = encode_header([("x", "F32", (2, 3)), ("none", "F16", (0,))], {"format": "pt"})
    (tmp_path / FILE).write_bytes(start + values.tobytes())
    assert len(start) % 8 == 0
    with safe_open(tmp_path / FILE, "np") as opened:
        assert opened.get_tensor("x").tolist() == values.reshape(2, 3).tolist()
        assert opened.get_tensor("none").shape == (0,)
        assert opened.metadata() == {"format": "pt"}


def test_a_file_cut_short_anywhere_is_incomplete_and_not_damaged(tmp_path: Path) -> None:
    for length in range(len(VALID)):
        with pytest.raises(IncompleteCheckpoint, match=rf"{FILE}: {length} bytes"):
            parse(tmp_path, VALID[:length])


def test_a_file_with_more_bytes_than_its_header_describes_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match="do not belong together"):
        parse(tmp_path, VALID + b"\0")


@given(data=st.binary(max_size=200))
@fuzzed
def test_any_bytes_are_refused_by_one_of_two_errors(tmp_path: Path, data: bytes) -> None:
    with pytest.raises((DamagedCheckpoint, IncompleteCheckpoint)):
        parse(tmp_path, data)


def agrees_with_upstream(folder: Path, data: bytes) -> None:
    """Ours refuses by one of its two errors, or finds exactly what upstream finds."""
    try:
        header = parse(folder, data)
    except (DamagedCheckpoint, IncompleteCheckpoint):
        return
    upstream = {name: (about["shape"], about["data"]) for name, about in deserialize(data)}
    ours = {
        t.name: (list(t.shape), bytearray(data[t.pieces[0].start :][: t.length]))
        for t in header.tensors
    }
    assert ours == upstream


@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=3
    )
)
@fuzzed
def test_changed_bytes_are_refused_or_understood_as_upstream_does(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(VALID)
    for position, value in changes:
        data[position] = value
    agrees_with_upstream(tmp_path, bytes(data))


SIZES = st.integers(-1, 9) | st.sampled_from([2**31, 2**63, 2**64, 10**30])
VALUES = st.none() | st.booleans() | SIZES | st.floats() | st.text(max_size=3)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "F6_E2M3", "I64", "f32", "X"]),
        "shape": st.lists(SIZES, max_size=2),
        "data_offsets": st.lists(SIZES, min_size=1, max_size=3) | st.tuples(SIZES, SIZES),
    },
    optional={"extra": VALUES},
)
HEADERS = st.dictionaries(
    st.text(st.characters(), max_size=2) | st.just("__metadata__"),
    ENTRIES | VALUES | st.dictionaries(st.text(max_size=2), VALUES | st.text(max_size=2)),
    max_size=3,
)


@given(header=HEADERS, data=st.binary(max_size=9))
@settings(fuzzed, max_examples=300)
def test_a_made_up_header_is_refused_or_understood_as_upstream_does(
    tmp_path: Path, header: object, data: bytes
) -> None:
    agrees_with_upstream(tmp_path, with_header(header, data))


@given(lengths=st.lists(st.integers(0, 3), max_size=5), data=st.data())
@fuzzed
def test_tensors_are_found_in_whatever_order_they_are_named(
    tmp_path: Path, lengths: list[int], data: st.DataObject
) -> None:
    """Half of these files also lose or gain a byte."""
    ends = [0, *np.cumsum(lengths).tolist()]
    entries = {
        f"t{n}": {"dtype": "U8", "shape": [length], "data_offsets": [ends[n], ends[n + 1]]}
        for n, length in enumerate(lengths)
    }
    names = data.draw(st.permutations(sorted(entries)))
    size = ends[-1] + data.draw(st.sampled_from([0, 0, 1, -1]))
    agrees_with_upstream(
        tmp_path, with_header({name: entries[name] for name in names}, bytes(range(max(0, size))))
    )


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":{"a":1}}',  # upstream holds only text
        b'{"__metadata__":{"a":NaN}}',
        '{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.encode("utf-16"),
        b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',  # half a character
        b'{"x":{"dtype":"F4","shape":[1],"data_offsets":[0,0]}}',  # half a byte
    ],
)
def test_what_only_python_would_accept_is_damaged(tmp_path: Path, header: bytes) -> None:
    data = with_header(header)
    with pytest.raises(DamagedCheckpoint):
        parse(tmp_path, data)
    with pytest.raises(SafetensorError):
        deserialize(data)


class CountingStore(FolderStore):
    """A folder that knows how many bytes were asked of it."""

    asked = 0

    def read_range(self, path: str, start: int, length: int) -> bytes | bytearray:
        self.asked += length
        return super().read_range(path, start, length)


@given(claimed=st.integers(0, 2**64 - 1) | st.integers(0, 300), size=st.integers(0, 200))
@fuzzed
def test_no_more_is_read_than_the_header_and_never_past_the_end(
    tmp_path: Path, claimed: int, size: int
) -> None:
    data = (struct.pack("<Q", claimed) + b" " * 200)[:size]
    (tmp_path / FILE).write_bytes(data)
    store = CountingStore(tmp_path)
    with pytest.raises((DamagedCheckpoint, IncompleteCheckpoint)):
        read_header(store, FILE, size)
    assert store.asked <= size


@pytest.mark.parametrize(
    "claimed", [MAX_HEADER_SIZE + 1, 2**63, 2**64 - 1], ids=["just above", "2^63", "2^64-1"]
)
def test_an_enormous_header_is_not_believed(tmp_path: Path, claimed: int) -> None:
    with pytest.raises(DamagedCheckpoint, match="claims a header"):
        parse(tmp_path, struct.pack("<Q", claimed) + b"{}")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "has 64 bits"),
        ({"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, "unknown dtype 'F99'"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "no usable shape"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "takes bytes"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "no usable shape"),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "no usable shape"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "overlap or leave a gap"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "unknown dtype"),
        ({"shape": [1], "data_offsets": [0, 4]}, "unknown dtype None"),
        (7, "no JSON object"),
    ],
)
def test_an_entry_that_does_not_add_up_is_named(tmp_path: Path, entry: object, said: str) -> None:
    with pytest.raises(DamagedCheckpoint, match=said):
        parse(tmp_path, with_header({"x": entry}, b"\0" * 4))


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    with pytest.raises(DamagedCheckpoint, match="overlap"):
        parse(tmp_path, with_header({"x": entry, "y": entry}, b"\0" * 4))


@pytest.mark.parametrize("header", [b"[1]", b"nul", b"\xff\xfe", b"[" * 5_000, b'"text"'])
def test_a_header_that_is_no_object_is_damaged(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(DamagedCheckpoint, match="header is damaged"):
        parse(tmp_path, with_header(header))


def write_index(folder: Path, weight_map: object) -> FolderStore:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return FolderStore(folder)


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b", 3])
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, file: object) -> None:
    with pytest.raises(DamagedCheckpoint, match="points outside"):
        read_index(write_index(tmp_path, {"x": file}), "model.safetensors.index.json")


@pytest.mark.parametrize("weight_map", [None, [], "x", {"x": ["a"]}])
def test_an_index_of_another_kind_is_damaged(tmp_path: Path, weight_map: object) -> None:
    with pytest.raises(DamagedCheckpoint, match="not a weight index"):
        read_index(write_index(tmp_path, weight_map), "model.safetensors.index.json")


def test_the_index_maps_tensors_to_files(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "one.safetensors")
    assert read_index(
        write_index(tmp_path, {"x": "one.safetensors"}), "model.safetensors.index.json"
    ) == {"x": "one.safetensors"}
