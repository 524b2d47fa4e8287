"""``pytorch_model.bin``, single and sharded, as torch.save writes it."""

import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.errors import CkptfuseError, DamagedCheckpoint, IncompleteCheckpoint
from ckptfuse.layouts import read_layout
from ckptfuse.merge.inputs import open_inputs
from ckptfuse.merge.memory import merge_to_memory
from ckptfuse.merge.once import merge_once
from ckptfuse.reading import load
from tests.helpers import CONFIG, bits, make_older
from tests.unit.test_merge import WEIGHTS, reference, state

SINGLE = "pytorch_model.bin"


def write_bin(folder: Path, tensors: Mapping[str, object], shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if shards == 1:
        torch.save(dict(tensors), folder / SINGLE)
    else:
        weight_map = {}
        for number in range(shards):
            names = sorted(tensors)[number::shards]
            file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
            torch.save({name: tensors[name] for name in names}, folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{SINGLE}.index.json").write_text(json.dumps(index))
    make_older(folder, 3600)
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_merge_of_bin_files_is_the_reference_in_safetensors(tmp_path: Path, shards: int) -> None:
    states = [state(seed) for seed in range(3)]
    for seed, tensors in enumerate(states):
        tensors["count"] = torch.tensor([seed, 7], dtype=torch.uint16)
        write_bin(tmp_path / f"step{seed}", tensors, shards)
    merge_once(str(tmp_path / "out"), [str(tmp_path / f"step{i}") for i in range(3)], WEIGHTS)
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == states[0].keys()
    for name, values in found.items():
        wanted = states[2][name]
        if name != "count":
            wanted = reference([tensors[name] for tensors in states], WEIGHTS)
        assert bits(values) == bits(wanted), name
    assert open_checkpoint(str(tmp_path / "out"))  # its index fits its files


def test_a_checkpoint_is_loaded_as_torch_loads_it(tmp_path: Path) -> None:
    tensors = state(3) | {"parameter": torch.nn.Parameter(torch.arange(3.0))}
    part = torch.arange(12.0).reshape(4, 3)[1:3]  # of a larger storage
    folder = write_bin(tmp_path / "step1", tensors | {"part": part})
    found = load(open_checkpoint(str(folder))).state_dict
    wanted = torch.load(folder / SINGLE, weights_only=True)
    assert found.keys() == wanted.keys()
    assert {k: bits(v) for k, v in found.items()} == {
        k: bits(v.detach()) for k, v in wanted.items()
    }


def test_tied_tensors_stay_equal(tmp_path: Path) -> None:
    for seed in range(2):
        shared = torch.full((3, 2), float(seed))
        write_bin(tmp_path / f"step{seed}", {"embed": shared, "head": shared})
    opened = [open_checkpoint(str(tmp_path / f"step{seed}")) for seed in range(2)]
    merged = merge_to_memory(open_inputs(opened, opened[-1]), (0.5, 0.5))
    assert merged["embed"].tolist() == merged["head"].tolist() == [[0.5, 0.5]] * 3


def test_what_is_no_plain_state_dict_is_refused_by_name(tmp_path: Path) -> None:
    for number, (saved, said) in enumerate(
        [
            ({"weight": torch.ones(2, 3).t()}, "contiguous"),
            ({"model": {"weight": torch.ones(2)}}, "'model' is no tensor"),
            ({"weight": torch.ones(2), "epoch": 3}, "'epoch' is no tensor"),
            ({"weight": torch.sparse_coo_tensor([[0]], [1.0], (2,))}, "not unpickled"),
        ]
    ):
        folder = write_bin(tmp_path / f"step{number}", saved)
        with pytest.raises(DamagedCheckpoint, match=said):
            read_layout(open_checkpoint(str(folder)))


def test_code_and_the_format_before_torch_1_6_are_refused(tmp_path: Path) -> None:
    folder = write_bin(tmp_path / "step1", {"w": torch.ones(2)})
    torch.save({"w": torch.ones(2)}, folder / SINGLE, _use_new_zipfile_serialization=False)
    with pytest.raises(DamagedCheckpoint, match=r"before torch 1\.6"):
        read_layout(open_checkpoint(str(folder)))
    torch.save({"w": Path("x")}, folder / SINGLE)
    with pytest.raises(DamagedCheckpoint, match="not unpickled"):
        read_layout(open_checkpoint(str(folder)))


def test_a_missing_shard_means_not_there_yet(tmp_path: Path) -> None:
    folder = write_bin(tmp_path / "step1", state(0), shards=3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(IncompleteCheckpoint, match="1 of 3 shards"):
        open_checkpoint(str(folder))


def test_damaged_files_raise_the_librarys_own_errors_only(tmp_path: Path) -> None:
    folder = write_bin(tmp_path / "step1", state(0))
    whole = (folder / SINGLE).read_bytes()
    start = whole.index(b"PK\x01\x02")  # the directory; before it mostly weights
    generator = random.Random(5)
    refused = 0
    for number in range(400):
        data = bytearray(whole)
        low = 0 if number % 2 else start
        for _ in range(generator.choice((1, 1, 2, 8))):
            data[generator.randrange(low, len(data))] = generator.randrange(256)
        if generator.random() < 0.1:
            del data[generator.randrange(len(data)) :]
        (folder / SINGLE).write_bytes(data)
        try:
            read_layout(open_checkpoint(str(folder)))
        except CkptfuseError:
            refused += 1
    assert refused > 100, "the damage reaches nothing that is read"
