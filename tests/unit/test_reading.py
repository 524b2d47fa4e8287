"""A checkpoint in memory: its tensors, its hash, and what makes it unusable."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.digests import LEAF_SIZE, content_digest
from ckptfuse.errors import ChangedCheckpoint, DamagedCheckpoint, NonFiniteValues, StoreError
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.reading import load
from ckptfuse.torch_dtypes import DTYPES
from tests.helpers import bits, make_older, write_checkpoint

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("shards", [1, 2])
def test_loading_gives_the_tensors_that_were_saved(tmp_path: Path, shards: int) -> None:
    saved = {str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES.values()}
    saved |= {"scalar": torch.tensor(-0.0), "empty": torch.empty(0, 3), "cube": torch.ones(2, 3, 4)}
    loaded = load(write_checkpoint(tmp_path / "step1", saved, shards=shards)).state_dict
    assert loaded.keys() == saved.keys()
    for name, expected in saved.items():
        assert (loaded[name].dtype, loaded[name].shape) == (expected.dtype, expected.shape)
        assert bits(loaded[name]) == bits(expected)


def test_a_header_of_odd_length_does_not_shift_a_value(tmp_path: Path) -> None:
    """Legal, if unusual: upstream pads, other writers do not."""
    write_checkpoint(tmp_path / "step1", {"x": torch.ones(1)})
    entry = {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]}
    header = json.dumps({"x": entry}).encode()
    header += b" " * ((1 - len(header)) % 8)
    values = struct.pack("<3d", 1.5, -2.5, 1e300)
    (tmp_path / "step1" / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + values)
    loaded = load(open_checkpoint(str(tmp_path / "step1"))).state_dict
    assert loaded["x"].tolist() == [1.5, -2.5, 1e300]


def test_loading_and_hashing_alone_find_the_same_fingerprint(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step1", {"x": torch.ones(3)}, shards=2)
    loaded = load(checkpoint)
    assert loaded.fingerprint == fingerprint_of(checkpoint)
    assert loaded.contents["config.json"] == (
        (tmp_path / "step1" / "config.json").stat().st_size,
        content_digest((tmp_path / "step1" / "config.json").read_bytes()),
    )


def test_the_hash_of_a_file_of_several_leaves_is_that_of_its_bytes(tmp_path: Path) -> None:
    values = torch.arange(LEAF_SIZE // 4 + 1000, dtype=torch.int32)
    loaded = load(write_checkpoint(tmp_path / "step1", {"x": values}))
    data = (tmp_path / "step1" / WEIGHTS).read_bytes()
    assert loaded.contents[WEIGHTS] == (len(data), content_digest(data))
    assert hashlib.sha256(bits(loaded.state_dict["x"])).digest() == (
        hashlib.sha256(bits(values)).digest()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nan_and_inf_are_named_by_checkpoint_and_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    bad = torch.tensor([1.0, float("nan"), float("-inf")], dtype=dtype)
    checkpoint = write_checkpoint(tmp_path / "step1", {"a": torch.ones(2), "b": bad})
    with pytest.raises(NonFiniteValues, match=r"'b' has 2 NaN or Inf values of 3") as caught:
        load(checkpoint)
    assert caught.value.checkpoint == "step1"


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.is_floating_point], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 4099])
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(
    tmp_path: Path, dtype: torch.dtype, value: float, place: int
) -> None:
    values = torch.linspace(-2, 2, 4100)
    load(write_checkpoint(tmp_path / "step1", {"w": values.to(dtype)}))
    values[place] = value
    with pytest.raises(NonFiniteValues, match="'w' has 1 NaN or Inf values of 4100"):
        load(write_checkpoint(tmp_path / "step2", {"w": values.to(dtype)}))


def test_a_buffer_that_merges_copy_may_hold_infinity(tmp_path: Path) -> None:
    bias = torch.tensor(-1e9).half()  # GPT-NeoX's, which float16 makes infinite
    tensors = {"w": torch.ones(2), "layers.0.attention.masked_bias": bias}
    loaded = load(write_checkpoint(tmp_path / "step1", tensors))
    assert loaded.state_dict["layers.0.attention.masked_bias"] == -torch.inf


def test_a_dtype_that_cannot_be_held_is_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step1", {"x": torch.ones(2).to(torch.float8_e5m2)})
    with pytest.raises(DamagedCheckpoint, match=r"'x' is stored as F8_E5M2"):
        load(checkpoint)


def test_files_written_again_since_the_listing_are_not_kept(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step1", {"x": torch.ones(3)})
    make_older(tmp_path / "step1", 60)
    with pytest.raises(ChangedCheckpoint, match="was written again or removed"):
        fingerprint_of(checkpoint)
    with pytest.raises(ChangedCheckpoint, match="was written again or removed"):
        load(checkpoint)


def test_a_file_that_shrank_since_the_listing_is_no_short_tensor(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step1", {"x": torch.ones(300)})
    save_file({"x": torch.ones(3)}, tmp_path / "step1" / WEIGHTS)
    with pytest.raises((StoreError, ChangedCheckpoint, DamagedCheckpoint)):
        load(checkpoint)
