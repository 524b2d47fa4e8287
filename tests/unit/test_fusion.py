"""The folder of a fusion: complete or absent, the same bytes wherever it is made, and its id."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ckptfuse import digests
from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.errors import ChangedCheckpoint, ConfigurationError, NonFiniteValues, StoreError
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.fusion import FusionSpec, Recipe
from ckptfuse.merge import folder
from ckptfuse.merge.folder import JOURNAL, merge_shard, unfinished_folder, write_fusion
from ckptfuse.merge.inputs import Inputs, open_inputs
from ckptfuse.merge.memory import merge_to_memory
from ckptfuse.merge.once import merge_once
from ckptfuse.merge.output_files import OutputFile
from ckptfuse.merge.passes import Pass
from ckptfuse.reading import load
from ckptfuse.store import FolderStore, S3Store, open_store
from ckptfuse.store.folder import TEMPORARY_PREFIX, _Reader
from tests.helpers import CONFIG, bits, folder_bytes, make_older, write_checkpoint
from tests.servers import S3Server
from tests.unit.test_merge import WEIGHTS, opened, three, write_unaligned


def spec_of(inputs: Inputs, weights: Sequence[float]) -> FusionSpec:
    prints = tuple(fingerprint_of(layout.checkpoint) for layout in inputs.layouts)
    return FusionSpec(
        prints, tuple(weights), fingerprint_of(inputs.ancillary.checkpoint), inputs.recipe
    )


def test_a_sharded_fusion_on_disk_holds_what_the_merge_in_memory_holds(tmp_path: Path) -> None:
    three(tmp_path, shards=3)
    inputs = opened(tmp_path)
    out = tmp_path / "out"
    contents = write_fusion(inputs, spec_of(inputs, WEIGHTS), FolderStore(out))
    written = load(open_checkpoint(str(out)))
    in_memory = merge_to_memory(inputs, WEIGHTS)
    assert {k: bits(v) for k, v in written.state_dict.items()} == {
        k: bits(v) for k, v in in_memory.items()
    }
    assert len(list(out.glob("*.safetensors"))) == 3
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (tmp_path / "step2" / index).read_bytes()
    assert {path: written.contents[path] for path in contents if path in written.contents} == {
        path: content for path, content in contents.items() if path in written.contents
    }


def test_repeated_runs_give_the_same_bytes_in_every_file(tmp_path: Path) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    first = write_fusion(inputs, spec_of(inputs, WEIGHTS), FolderStore(tmp_path / "a"))
    second = write_fusion(inputs, spec_of(inputs, WEIGHTS), FolderStore(tmp_path / "b"))
    assert first == second
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert {"model.safetensors", "config.json", "fusion.json", "README.md"} == first.keys()


def test_the_folder_names_its_fusion_and_weights_and_nothing_that_varies(tmp_path: Path) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    spec = spec_of(inputs, WEIGHTS)
    contents = write_fusion(inputs, spec, FolderStore(tmp_path / "out"))
    about = json.loads((tmp_path / "out" / "fusion.json").read_text())
    assert about["fusion"] == spec.id
    written = folder_bytes(tmp_path / "out")
    assert contents == {p: (len(d), digests.content_digest(d)) for p, d in written.items()}
    assert about["files"] == {
        path: {"size": size, "hash": found}
        for path, (size, found) in contents.items()
        if path != "fusion.json"
    }
    assert about["weights"] == list(WEIGHTS)
    assert [float.fromhex(weight) for _, weight in about["inputs"]] == list(WEIGHTS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert spec.fingerprints[0][:16] in card
    for text in (json.dumps(about), card):
        assert str(tmp_path) not in text


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_asked_for_changes_tensors_config_and_total_size(
    tmp_path: Path, shards: int, key: str
) -> None:
    config = {**CONFIG, key: "float32"}
    for step in range(2):
        tensors = {"a": torch.full((3,), 1.0 + step), "b": torch.ones(2), "n": torch.tensor([step])}
        write_checkpoint(tmp_path / f"step{step}", tensors, config=config, shards=shards)
    inputs = opened(tmp_path, 2, dtype="bfloat16")
    out = tmp_path / "out"
    write_fusion(inputs, spec_of(inputs, (0.5, 0.5)), FolderStore(out))
    merged = load(open_checkpoint(str(out))).state_dict
    assert (merged["a"].dtype, merged["n"].dtype) == (torch.bfloat16, torch.int64)
    assert merged["a"].tolist() == [1.5, 1.5, 1.5]
    written = json.loads((out / "config.json").read_text())
    assert written[key] == "bfloat16"
    assert set(written) == set(config)
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 5 * 2 + 8


def test_a_configuration_written_again_after_the_weights_were_merged_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    spec = spec_of(inputs, WEIGHTS)
    merged = folder.merge_to_stores

    def and_then(*arguments: Any, **named: Any) -> Any:
        made = merged(*arguments, **named)
        make_older(Path(inputs.ancillary.checkpoint.uri), 50)
        return made

    monkeypatch.setattr(folder, "merge_to_stores", and_then)
    with pytest.raises(ChangedCheckpoint, match=r"config\.json was written again"):
        write_fusion(inputs, spec, FolderStore(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_input_is_named_and_no_folder_is_left(tmp_path: Path, bad: float) -> None:
    write_checkpoint(tmp_path / "step0", {"a": torch.ones(4), "b": torch.ones(4)})
    write_checkpoint(tmp_path / "step1", {"a": torch.ones(4), "b": torch.tensor([1, 1, bad, 1.0])})
    inputs = opened(tmp_path, 2)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(NonFiniteValues, match=r"'b' has 1 NaN or Inf") as caught:
        write_fusion(inputs, spec_of(inputs, (0.5, 0.5)), FolderStore(tmp_path / "out"))
    assert caught.value.checkpoint == "step1"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_place_that_is_taken_is_refused_and_left_alone(tmp_path: Path) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(ConfigurationError, match="is there already"):
        write_fusion(inputs, spec_of(inputs, WEIGHTS), FolderStore(tmp_path / "out"))
    assert folder_bytes(tmp_path / "out") == {"precious": b"mine"}
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_place_that_cannot_be_renamed_to_is_refused_before_a_merge(tmp_path: Path) -> None:
    three(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="a link or a mounted folder"):
        merge_once(str(tmp_path / "out"), [str(tmp_path / "step0")], [1.0])
    merge_once(str(tmp_path / "out" / "inside"), [str(tmp_path / "step0")], [1.0])
    assert (tmp_path / "elsewhere" / "inside" / "model.safetensors").is_file()


def test_a_journal_that_a_disk_lost_costs_its_file_and_no_merge(tmp_path: Path) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    spec = spec_of(inputs, WEIGHTS)
    place = unfinished_folder(tmp_path / "out", spec.id)
    merge_shard(inputs, spec, FolderStore(tmp_path / "out"), 0, 1)
    (journal,) = (path for path in place.iterdir() if path.name.startswith(JOURNAL))
    journal.write_bytes(b"")
    contents = write_fusion(inputs, spec, FolderStore(tmp_path / "out"))
    assert set(folder_bytes(tmp_path / "out")) == set(contents)


def test_the_fusion_id_ignores_inputs_of_weight_zero_and_knows_all_else() -> None:
    spec = FusionSpec(("a", "b"), (0.5, 0.5), "b")
    assert FusionSpec(("a", "z", "b"), (0.5, 0.0, 0.5), "b").id == spec.id
    others = [
        FusionSpec(("b", "a"), (0.5, 0.5), "b"),
        FusionSpec(("a", "b"), (0.5, np.nextafter(0.5, 1)), "b"),
        FusionSpec(("a", "b"), (0.5, 0.5), "a"),
        FusionSpec(("a", "b"), (0.5, 0.5), "b", Recipe(dtype="float32")),
        FusionSpec(("a", "b"), (0.5, 0.5), "b", Recipe(copied=("*.bias",))),
        FusionSpec(("a", "b"), (0.5, 0.5), "b", Recipe(form="dcp")),
        FusionSpec(("a", "b"), (0.5, 0.5), "b", Recipe(form="dcp", optimizer="none")),
    ]
    assert len({spec.id, *(other.id for other in others)}) == 8
    assert FusionSpec(("a", "b"), (0.5, 0.5), "b", Recipe(strict=True)).id == spec.id


def test_a_fused_llama_loads_in_transformers_with_the_averaged_weights(
    llamas: list[Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    checkpoints = [open_checkpoint(str(path)) for path in llamas]
    inputs = open_inputs(checkpoints, checkpoints[-1])
    out = tmp_path / "fused"
    write_fusion(inputs, spec_of(inputs, WEIGHTS), FolderStore(out))
    assert (out / "generation_config.json").is_file()
    assert (out / "config.json").read_bytes() == (llamas[-1] / "config.json").read_bytes()
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    parts = [AutoModelForCausalLM.from_pretrained(path) for path in llamas]
    average = sum(w * p.lm_head.weight.double() for w, p in zip(WEIGHTS, parts, strict=True))
    assert torch.allclose(model.lm_head.weight.double(), average, atol=1e-6)
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


def test_an_s3_prefix_gets_the_same_bytes_as_a_folder(tmp_path: Path, moto_s3: S3Server) -> None:
    three(tmp_path, shards=2)
    inputs = opened(tmp_path)
    contents = write_fusion(inputs, spec_of(inputs, WEIGHTS), FolderStore(tmp_path / "out"))
    remote = open_store("s3://bucket/fused")
    assert write_fusion(inputs, spec_of(inputs, WEIGHTS), remote) == contents
    assert {e.path: remote.read(e.path) for e in remote.list()} == folder_bytes(tmp_path / "out")
    source = open_store("s3://bucket/step2")
    for path, data in folder_bytes(tmp_path / "step2").items():
        source.write(path, data)
    from_s3 = open_inputs(
        [layout.checkpoint for layout in inputs.layouts[:2]]
        + [open_checkpoint("s3://bucket/step2")],
        inputs.ancillary.checkpoint,
    )
    merged, local = merge_to_memory(from_s3, WEIGHTS), merge_to_memory(inputs, WEIGHTS)
    assert {k: bits(v) for k, v in merged.items()} == {k: bits(v) for k, v in local.items()}


class Remembering(S3Store):
    """A prefix that remembers in which order its small files came."""

    def __init__(self, bucket: str, prefix: str) -> None:
        super().__init__(bucket, prefix)
        self.order: list[str] = []

    def write(self, path: str, data: bytes) -> None:
        self.order.append(path)
        super().write(path, data)


def test_on_s3_the_configuration_comes_last_so_that_no_half_model_is_taken_for_one(
    tmp_path: Path, moto_s3: S3Server
) -> None:
    three(tmp_path, shards=2)
    (tmp_path / "step2" / "tokenizer.json").write_text("{}")
    inputs = opened(tmp_path)
    target = Remembering("bucket", "in-order")
    write_fusion(inputs, spec_of(inputs, WEIGHTS), target)
    assert target.order[-1] == "config.json"
    final = [path for path in target.order if not path.startswith(JOURNAL)]
    assert len(final) == 5


def test_a_merge_that_was_cut_short_goes_on_with_the_files_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(tmp_path, shards=3)
    inputs = opened(tmp_path)
    spec = spec_of(inputs, WEIGHTS)
    whole = write_fusion(inputs, spec, FolderStore(tmp_path / "whole"))
    target = tmp_path / "out"
    merge_file, files = Pass.merge_file, []

    def breaking(self: Pass, file: OutputFile, *rest: Any) -> list[str]:
        if len(files) == 2:
            raise StoreError("the disk went away")
        files.append(file.name)
        return merge_file(self, file, *rest)

    monkeypatch.setattr(Pass, "merge_file", breaking)
    with pytest.raises(StoreError, match="went away"):
        write_fusion(inputs, spec, FolderStore(target))
    assert not target.exists()
    monkeypatch.setattr(
        Pass, "merge_file", lambda *given: files.append(given[1].name) or merge_file(*given)
    )
    assert write_fusion(inputs, spec, FolderStore(target)) == whole
    assert len(files) == len(set(files)) == 3, "a file was merged twice"
    assert folder_bytes(target) == folder_bytes(tmp_path / "whole")


def test_shards_that_workers_merge_are_taken_up_by_the_one_who_ends_it(tmp_path: Path) -> None:
    three(tmp_path, shards=3)
    inputs = opened(tmp_path)
    spec = spec_of(inputs, WEIGHTS)
    whole = write_fusion(inputs, spec, FolderStore(tmp_path / "whole"))
    target = FolderStore(tmp_path / "out")
    for shard in (1, 0):
        made = merge_shard(inputs, spec, target, shard, 2)
        assert made == {name: whole[name] for name in made}
        assert not target.root.exists()
    unfinished = unfinished_folder(target.root, spec.id)
    (unfinished / f"{TEMPORARY_PREFIX}of-a-killed-worker").touch()
    assert write_fusion(inputs, spec, target) == whole
    assert folder_bytes(target.root) == folder_bytes(tmp_path / "whole")
    with pytest.raises(ConfigurationError, match="shard 2 of 2"):
        merge_shard(inputs, spec, target, 2, 2)


def test_on_s3_the_same_merge_goes_on_in_its_place_and_no_other_does(
    tmp_path: Path, moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(tmp_path, shards=2)
    uris = [str(tmp_path / f"step{step}") for step in range(3)]
    merge_file, files = Pass.merge_file, []

    def breaking(self: Pass, file: OutputFile, *rest: Any) -> list[str]:
        if files:
            raise StoreError("the network went away")
        files.append(file.name)
        return merge_file(self, file, *rest)

    monkeypatch.setattr(Pass, "merge_file", breaking)
    with pytest.raises(StoreError, match="went away"):
        merge_once("s3://bucket/shared", uris, WEIGHTS)
    monkeypatch.setattr(Pass, "merge_file", merge_file)
    with pytest.raises(ConfigurationError, match="not empty"):
        merge_once("s3://bucket/shared", uris, (0.2, 0.2, 0.6))
    spec, contents = merge_once("s3://bucket/shared", uris, WEIGHTS)
    assert spec == spec_of(opened(tmp_path), WEIGHTS)
    assert {entry.path for entry in open_store("s3://bucket/shared").list()} == contents.keys()


def test_a_merge_that_fails_for_good_leaves_nothing_on_s3(
    tmp_path: Path, moto_s3: S3Server
) -> None:
    for step in range(2):
        nan = torch.tensor([float("nan") if step else 1.0])
        write_checkpoint(tmp_path / f"step{step}", {"a": torch.ones(2), "b": nan}, shards=2)
    uris = [str(tmp_path / f"step{step}") for step in range(2)]
    with pytest.raises(NonFiniteValues, match="'b'"):
        merge_once("s3://bucket/broken", uris, (0.5, 0.5))
    assert open_store("s3://bucket/broken").list() == []


@pytest.mark.parametrize("leaf", [40, 4096, digests.LEAF_SIZE])
@pytest.mark.parametrize("odd", ["no", "other header", "other order", "other dtype"])
def test_fingerprints_from_the_bytes_of_the_merge_are_those_of_a_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaf: int, odd: str
) -> None:
    """Also where a file is laid out in another way than the output's, and is read by itself."""
    states = three(tmp_path)
    file = tmp_path / "step1" / "model.safetensors"
    if odd == "other header":
        save_file(states[1], file, {"format": "pt", "a long word": "or two " * 10})
    if odd == "other order":
        write_unaligned(tmp_path / "step1", states[1])
    for step in range(3):
        (tmp_path / f"step{step}" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(digests, "LEAF_SIZE", leaf)
    monkeypatch.setattr(FolderStore, "request_size", 100)  # less than a leaf, or some of them
    recipe = Recipe(dtype="float32" if odd == "other dtype" else None)
    uris = [str(tmp_path / f"step{step}") for step in range(3)]
    spec, _ = merge_once(str(tmp_path / "out"), uris, WEIGHTS, recipe=recipe)
    assert spec.fingerprints == tuple(fingerprint_of(open_checkpoint(uri)) for uri in uris)


def test_a_merge_by_hand_reads_every_byte_of_the_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(tmp_path)
    size = (tmp_path / "step0" / "model.safetensors").stat().st_size
    start = min(t.pieces[0].start for t in opened(tmp_path).ancillary.tensors.values())
    read: list[int] = []
    read_into = _Reader.read_into

    def counted(self: _Reader, start: int, view: memoryview) -> None:
        read.append(len(view))
        read_into(self, start, view)

    monkeypatch.setattr(_Reader, "read_into", counted)
    merge_once(str(tmp_path / "out"), [str(tmp_path / f"step{i}") for i in range(3)], WEIGHTS)
    headers, configurations = 3 * 2 * start, 3 * (tmp_path / "step0" / "config.json").stat().st_size
    assert 3 * size <= sum(read) <= 3 * size + headers + configurations
