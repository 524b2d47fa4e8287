"""Distributed checkpoints that torch wrote on several processes, merged and resumed from."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from dataclasses import make_dataclass
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.errors import (
    CkptfuseError,
    ConfigurationError,
    DamagedCheckpoint,
    IncompleteCheckpoint,
    MismatchedCheckpoints,
)
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.fusion import Recipe
from ckptfuse.layouts import read_layout, read_training_state
from ckptfuse.listing import Conventions, find
from ckptfuse.merge.inputs import open_inputs
from ckptfuse.merge.memory import merge_to_memory
from ckptfuse.merge.once import form_of, merge_once
from ckptfuse.reading import load
from ckptfuse.store import FolderStore
from tests.distributed import launch
from tests.helpers import bits, make_older
from tests.servers import S3Server
from tests.unit.test_merge import reference

WEIGHTS = (0.25, 0.75)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two checkpoints of FSDP on two processes, with AdamW and with fp32 master weights."""
    folder = tmp_path_factory.mktemp("trained")
    kinds = ("adamw", "masters")
    found = {kind: [folder / kind / f"step-{seed}" for seed in (1, 2)] for kind in kinds}
    launch(2, *(("write", kind, path.name[-1], path) for kind in kinds for path in found[kind]))
    for path in (*found["adamw"], *found["masters"]):
        make_older(path, 3600)
    return found


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], Path]:
    """The same tensors cut in other ways: (step, axis, ranks) -> checkpoint."""
    folder = tmp_path_factory.mktemp("cut")
    found = {
        (step, axis, ranks): folder / f"{ranks}-ranks-axis-{axis}" / f"step-{step}"
        for step, axis, ranks in ((1, 0, 2), (1, 1, 2), (2, 0, 2), (2, 1, 2), (2, 0, 3), (2, 1, 3))
    }
    for count in (2, 3):
        launch(
            count,
            *(
                ("columns", step, axis, path)
                for (step, axis, ranks), path in found.items()
                if ranks == count
            ),
        )
    return found


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, as torch itself reads it in one process."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    state = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in metadata.state_dict_metadata.items()
        if hasattr(about, "size")
    }
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(flatten_state_dict=False))
    return state


def expected(paths: list[Path], name: str) -> torch.Tensor:
    return reference([loaded(path)[name] for path in paths], WEIGHTS)


def merged(paths: list[Path], out: Path, **recipe: object) -> Path:
    merge_once(str(out), [str(p) for p in paths], WEIGHTS, recipe=Recipe(**recipe))  # type: ignore[arg-type]
    return out


def test_tensors_are_where_torch_reads_them(trained: dict[str, list[Path]]) -> None:
    path = trained["adamw"][0]
    state = loaded(path)
    layout = read_training_state(open_checkpoint(str(path)))
    assert layout.tensors.keys() == state.keys()
    for name, tensor in layout.tensors.items():
        assert tensor.shape == tuple(state[name].shape)
        for piece in tensor.pieces:
            ends = zip(piece.box.offsets, piece.box.shape, strict=True)
            part = state[name][tuple(slice(start, start + length) for start, length in ends)]
            data = (path / piece.file).read_bytes()[piece.start :]
            assert data.startswith(bits(part)), name


def test_the_model_is_under_its_own_names_without_the_optimizer(
    trained: dict[str, list[Path]],
) -> None:
    layout = read_layout(open_checkpoint(str(trained["adamw"][0])))
    names = {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias", "2.running_mean"}
    assert layout.tensors.keys() == names | {"2.running_var", "2.num_batches_tracked"}


def test_a_merge_in_the_checkpoints_own_form_is_the_reference_bit_for_bit(
    trained: dict[str, list[Path]], tmp_path: Path
) -> None:
    paths = trained["adamw"]
    uris = [str(path) for path in paths]
    spec, _ = merge_once(str(tmp_path / "out"), uris, WEIGHTS, recipe=Recipe(form="dcp"))
    assert spec.fingerprints == tuple(fingerprint_of(open_checkpoint(uri)) for uri in uris)
    out = loaded(tmp_path / "out")
    newest = loaded(paths[-1])
    assert out.keys() == newest.keys()
    for name, values in out.items():
        is_merged = name.startswith("model.") and values.is_floating_point()
        assert bits(values) == bits(expected(paths, name) if is_merged else newest[name]), name


@pytest.mark.parametrize("kind", ["adamw", "masters"])
def test_a_trainer_that_resumes_on_two_processes_trains_the_merge(
    trained: dict[str, list[Path]], tmp_path: Path, kind: str
) -> None:
    """One step at a learning rate of 0 writes fp32 master weights back over the model's."""
    paths = trained[kind]
    out = merged(paths, tmp_path / "out", form="dcp")
    launch(2, ("resume", kind, out, tmp_path / "training.pt"))
    training = torch.load(tmp_path / "training.pt", weights_only=True)
    for name in ("0.weight", "1.weight", "1.bias", "2.weight", "2.bias"):
        wanted = expected(paths, f"model.{name}")
        if kind == "masters":  # merged in fp32, then rounded by the optimizer
            wanted = expected(paths, f"optim.state.{name}.master_param").bfloat16()
        assert bits(training[name]) == bits(wanted), name
    assert not torch.equal(training["1.weight"], loaded(paths[-1])["model.1.weight"])


def test_moments_are_averaged_or_left_out_as_asked(
    trained: dict[str, list[Path]], tmp_path: Path
) -> None:
    paths = trained["adamw"]
    average = loaded(merged(paths, tmp_path / "average", form="dcp", optimizer="average"))
    name = "optim.state.1.weight.exp_avg"
    assert bits(average[name]) == bits(expected(paths, name))
    assert bits(average["model.1.weight"]) == bits(expected(paths, "model.1.weight"))
    without = merged(paths, tmp_path / "none", form="dcp", optimizer="none")
    state = loaded(without)
    assert state.keys() == {name for name in average if not name.startswith("optim.")}
    assert bits(state["model.1.weight"]) == bits(expected(paths, "model.1.weight"))
    metadata = dcp.FileSystemReader(without).read_metadata()
    assert not any("optim" in name for name in metadata.state_dict_metadata)
    assert "train_state.seen" in metadata.state_dict_metadata
    sizes = [sum(f.stat().st_size for f in p.glob("*.distcp")) for p in (paths[-1], without)]
    assert sizes[1] < sizes[0] / 2


def test_weights_in_an_optimizer_under_an_unknown_name_are_refused_until_named(
    trained: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptfuse.merge.inputs.MASTERS", ())
    paths = trained["masters"]
    with pytest.raises(MismatchedCheckpoints, match=r"master_param.*--master"):
        merged(paths, tmp_path / "out", form="dcp")
    out = loaded(merged(paths, tmp_path / "out", form="dcp", masters=("*.master_param",)))
    name = "optim.state.1.weight.master_param"
    assert bits(out[name]) == bits(expected(paths, name))


@pytest.mark.parametrize("before", [(1, 0, 2), (1, 1, 2)])
@pytest.mark.parametrize("after", [(2, 0, 2), (2, 1, 2), (2, 0, 3), (2, 1, 3)])
def test_checkpoints_cut_along_other_axes_and_over_other_ranks_merge_the_same(
    cut: dict[tuple[int, int, int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: tuple[int, int, int],
    after: tuple[int, int, int],
) -> None:
    """As after a restart on other ranks or with other parallelism."""
    paths = [cut[before], cut[after]]
    for request_size in (512 * 1024, 40):
        monkeypatch.setattr(FolderStore, "request_size", request_size)
        out = loaded(merged(paths, tmp_path / f"out-{request_size}", form="dcp"))
        opened = [open_checkpoint(str(path)) for path in paths]
        memory = merge_to_memory(open_inputs(opened, opened[-1]), WEIGHTS)
        for name in ("matrix", "stack"):
            assert bits(out[name]) == bits(memory[name]) == bits(expected(paths, name)), name
        assert out["count"] == memory["count"] == 2


def test_whole_tensors_come_out_as_a_hugging_face_folder(
    trained: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / path.name for path in trained["adamw"]]
    for path, source in zip(paths, trained["adamw"], strict=True):
        shutil.copytree(source, path)
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        merged(paths, tmp_path / "out")
    for path in paths:
        (path / "config.json").write_text('{"model_type": "toy"}')
    monkeypatch.setattr("ckptfuse.merge.output_files._SHARD_BYTES", 300)
    out = merged(paths, tmp_path / "out")
    assert (out / "model.safetensors.index.json").exists()
    found: dict[str, torch.Tensor] = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    assert bits(found["1.weight"]) == bits(expected(paths, "model.1.weight"))
    before, after = (read_layout(open_checkpoint(str(path))) for path in (paths[0], out))
    assert after.tensors.keys() == before.tensors.keys()


def test_from_s3_the_same_bytes_come_out(
    trained: dict[str, list[Path]], tmp_path: Path, moto_s3: S3Server
) -> None:
    from ckptfuse.store import open_store

    paths = trained["masters"]
    for path in paths:
        store = open_store(f"s3://bucket/trajectory/{path.name}")
        for file in path.iterdir():
            store.write(file.name, file.read_bytes())
    uris = [f"s3://bucket/trajectory/{path.name}" for path in paths]
    here = merged(paths, tmp_path / "here", form="dcp")
    merge_once("s3://bucket/merged", uris, WEIGHTS, recipe=Recipe(form=form_of(uris[-1])))
    there = open_store("s3://bucket/merged")
    assert {e.path: there.read(e.path) for e in there.list()} == {
        file.name: file.read_bytes() for file in here.iterdir()
    }


def test_a_checkpoint_is_complete_when_every_file_is_as_long_as_its_metadata_says(
    trained: dict[str, list[Path]], tmp_path: Path
) -> None:
    path = tmp_path / "step-1"
    shutil.copytree(trained["adamw"][0], path)
    part = path / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(IncompleteCheckpoint, match=r"__1_0\.distcp"):
        read_layout(open_checkpoint(str(path)))
    part.unlink()
    with pytest.raises(IncompleteCheckpoint, match=r"__1_0\.distcp"):
        read_layout(open_checkpoint(str(path)))
    (path / ".metadata").unlink()
    with pytest.raises(IncompleteCheckpoint, match="no config"):
        open_checkpoint(str(path))


def test_a_dtype_that_torch_cannot_merge_is_named(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2, dtype=torch.complex64)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(DamagedCheckpoint, match=r"'w' is stored as C64"):
        load(open_checkpoint(str(tmp_path)))


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch unpickled",)


def test_code_in_a_pickle_is_refused_by_name_and_not_run(
    trained: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-1"
    shutil.copytree(trained["adamw"][0], path)
    (path / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(DamagedCheckpoint, match=r"system.*not unpickled"):
        read_layout(open_checkpoint(str(path)))
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_damaged_files_raise_the_librarys_own_errors_only(
    trained: dict[str, list[Path]], tmp_path: Path, file: str
) -> None:
    path = tmp_path / "step-1"
    shutil.copytree(trained["masters"][0], path)
    whole = (path / file).read_bytes()
    generator = random.Random(11)
    refused = 0
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 1, 2, 8))):
            data[generator.randrange(len(data))] = generator.randrange(256)
        if generator.random() < 0.2:
            del data[generator.randrange(len(data)) :]
        (path / file).write_bytes(data)
        try:
            read_training_state(open_checkpoint(str(path)))
        except CkptfuseError:
            refused += 1
    assert refused > 40, "the damage reaches nothing that is read"


def test_merging_needs_no_torch(trained: dict[str, list[Path]], tmp_path: Path) -> None:
    program = (
        "import sys; from ckptfuse.merge.once import merge_once;"
        "from ckptfuse.fusion import Recipe;"
        f"merge_once({str(tmp_path / 'out')!r}, {[str(p) for p in trained['adamw']]!r}, (0.5, 0.5),"
        " recipe=Recipe(form='dcp')); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def as_olmo_core_writes(path: Path) -> None:
    """The places of items as a class of OLMo-core's own, which is what its writer pickles."""
    module = "olmo_core.distributed.checkpoint.filesystem"
    fields = ("relative_path", "offset", "length")
    own = make_dataclass("_StorageInfo", fields, namespace={"__module__": module})
    metadata = pickle.loads(path.read_bytes())
    metadata.storage_data = {
        index: own(*(getattr(place, name) for name in fields))
        for index, place in metadata.storage_data.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        for parent in accumulate(module.split("."), "{}.{}".format):
            patch.setitem(sys.modules, parent, SimpleNamespace(_StorageInfo=own))
        path.write_bytes(pickle.dumps(metadata))


def test_a_bucket_of_distributed_checkpoints_is_listed_and_loaded(
    trained: dict[str, list[Path]], tmp_path: Path
) -> None:
    """As OLMo-core lays them out: in a folder of the checkpoint's, with the trainer's beside it."""
    for number, source in enumerate(trained["adamw"]):
        folder = tmp_path / "bucket" / f"step{1000 * (number + 1)}"
        shutil.copytree(source, folder / "model_and_optim")
        as_olmo_core_writes(folder / "model_and_optim" / ".metadata")
        (folder / "train").mkdir()
        (folder / "train" / "rank0.pt").write_bytes(b"whatever a trainer keeps")
    (tmp_path / "bucket" / "step3000" / "model_and_optim").mkdir(parents=True)
    (tmp_path / "bucket" / "step3000" / "model_and_optim" / "__0_0.distcp").write_bytes(b"x")
    listing = find(FolderStore(tmp_path / "bucket"), Conventions(settle_seconds=0))
    assert [checkpoint.step for checkpoint in listing.complete] == [1000, 2000]
    assert [refused.checkpoint.step for refused in listing.incomplete] == [3000]
    assert len(set(listing.architectures.values())) == 1
    model = load(listing.complete[1])
    state = loaded(trained["adamw"][1])
    assert bits(model.state_dict["1.weight"]) == bits(state["model.1.weight"])
    out = tmp_path / "out"
    uris = [checkpoint.uri for checkpoint in listing.complete]
    merge_once(str(out), uris, WEIGHTS, recipe=Recipe(form=form_of(uris[0])))
    assert (out / "train" / "rank0.pt").read_bytes() == b"whatever a trainer keeps"
    made = load(open_checkpoint(str(out)))
    assert bits(made.state_dict["1.weight"]) == bits(expected(trained["adamw"], "model.1.weight"))


def test_an_optimizer_beside_the_model_is_copied_unless_it_holds_weights(
    trained: dict[str, list[Path]], tmp_path: Path
) -> None:
    """As Accelerate lays them out: each in a folder with a .metadata of its own."""
    for kind in ("adamw", "masters"):
        for source in trained[kind]:
            folder = tmp_path / kind / source.name
            shutil.copytree(trained["adamw"][0].with_name(source.name), folder / "pytorch_model")
            shutil.copytree(source, folder / "optimizer_0")
    uris = {k: [str(tmp_path / k / p.name) for p in trained[k]] for k in ("adamw", "masters")}
    copied = tmp_path / "out"
    merge_once(str(copied), uris["adamw"], WEIGHTS, recipe=Recipe(form="dcp"))
    assert (copied / "optimizer_0" / ".metadata").exists()
    assert (copied / "optimizer_0" / "__0_0.distcp").read_bytes() == (
        trained["adamw"][-1] / "__0_0.distcp"
    ).read_bytes()
    with pytest.raises(MismatchedCheckpoints, match=r"master_param.*--optimizer none"):
        merge_once(str(tmp_path / "no"), uris["masters"], WEIGHTS, recipe=Recipe(form="dcp"))
    without = Recipe(form="dcp", optimizer="none")
    merge_once(str(tmp_path / "without"), uris["masters"], WEIGHTS, recipe=without)
    assert not (tmp_path / "without" / "optimizer_0").exists()


def test_a_merge_can_be_merged_again(trained: dict[str, list[Path]], tmp_path: Path) -> None:
    paths = trained["adamw"]
    first = merged(paths, tmp_path / "first", form="dcp")
    second = merged([paths[0], first], tmp_path / "second", form="dcp")
    about = json.loads((second / "fusion.json").read_text())
    assert about["files"].keys() == {path.name for path in second.iterdir()} - {"fusion.json"}
    parts = [loaded(path)["model.1.weight"] for path in (paths[0], first)]
    assert bits(loaded(second)["model.1.weight"]) == bits(reference(parts, WEIGHTS))
