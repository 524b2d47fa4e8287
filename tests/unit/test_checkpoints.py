"""When a folder of the bucket counts as a checkpoint, and what its identity rests on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ckptfuse.checkpoints import Conventions, Listing, find, open_checkpoint, read_layout
from ckptfuse.errors import ChangedCheckpoint, DamagedCheckpoint, NonFiniteValues
from ckptfuse.reading import fingerprint_of, load
from ckptfuse.store import FolderStore, S3Store
from tests.helpers import make_older, write_checkpoint
from tests.unit.conftest import S3Server

TENSORS = {"a": torch.ones(3, 4), "b": torch.arange(5.0), "c": torch.zeros(2)}


def look(bucket: Path, **conventions: object) -> Listing:
    return find(FolderStore(bucket), Conventions(**conventions))  # type: ignore[arg-type]


def names(listing: Listing) -> list[str]:
    return [checkpoint.name for checkpoint in listing.complete]


def test_complete_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        write_checkpoint(tmp_path / f"checkpoint-{step}", TENSORS)
    assert names(look(tmp_path)) == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]


def test_sharded_and_single_checkpoints_of_the_same_tensors_have_one_architecture(
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path / "step1", TENSORS)
    write_checkpoint(tmp_path / "step2", TENSORS, shards=3)
    assert len(set(look(tmp_path).architectures.values())) == 1


def test_other_folders_and_files_are_passed_over(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "runs", TENSORS)
    write_checkpoint(tmp_path / "checkpoint-1" / "nested", TENSORS)
    (tmp_path / "step5").write_text("a file")
    listing = look(tmp_path)
    assert names(listing) == []
    assert listing.damaged == ()


@pytest.mark.parametrize("lacking", ["config.json", "model-00002-of-00003.safetensors"])
def test_a_checkpoint_that_lacks_a_file_is_not_there_yet(tmp_path: Path, lacking: str) -> None:
    write_checkpoint(tmp_path / "step1", TENSORS, shards=3)
    (tmp_path / "step1" / lacking).unlink()
    listing = look(tmp_path)
    assert names(listing) == []
    assert lacking.removesuffix(".safetensors") in listing.incomplete[0].reason


def test_a_checkpoint_without_weights_is_not_there_yet(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step1", TENSORS)
    (tmp_path / "step1" / "model.safetensors").unlink()
    assert "no model.safetensors" in look(tmp_path).incomplete[0].reason


@pytest.mark.parametrize("length", [0, 4, 60, -1])
def test_a_file_that_is_shorter_than_its_header_says_is_not_there_yet(
    tmp_path: Path, length: int
) -> None:
    write_checkpoint(tmp_path / "step1", TENSORS)
    file = tmp_path / "step1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    make_older(tmp_path / "step1", 3600)
    listing = look(tmp_path)
    assert names(listing) == []
    assert len(listing.incomplete) == 1


def test_a_damaged_header_is_told_and_the_others_count(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step1", TENSORS)
    write_checkpoint(tmp_path / "step2", TENSORS)
    with (tmp_path / "step1" / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 8)
    make_older(tmp_path / "step1", 3600)
    listing = look(tmp_path)
    assert names(listing) == ["step2"]
    assert "claims a header" in listing.damaged[0].reason


def test_a_fresh_checkpoint_must_have_been_quiet_for_a_while(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step1", TENSORS, age=5)
    assert "counts after 30 s of quiet" in look(tmp_path).incomplete[0].reason
    assert names(look(tmp_path, settle_seconds=4)) == ["step1"]


def test_the_trainers_state_written_last_ends_the_wait(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step1", TENSORS, age=5)
    (tmp_path / "step1" / "trainer_state.json").write_text("{}")
    assert names(look(tmp_path)) == ["step1"]


def test_a_file_after_the_trainers_state_starts_the_wait_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step1", TENSORS, age=5)
    (tmp_path / "step1" / "trainer_state.json").write_text("{}")
    make_older(tmp_path / "step1", 5)
    (tmp_path / "step1" / "optimizer.pt").write_bytes(b"x")
    assert names(look(tmp_path)) == []


def test_with_a_marker_only_the_marker_decides(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step1", TENSORS)
    assert "marker file 'DONE'" in look(tmp_path, marker="DONE").incomplete[0].reason
    (tmp_path / "step1" / "DONE").touch()
    assert names(look(tmp_path, marker="DONE")) == ["step1"]


def test_optimizer_state_is_no_part_of_a_checkpoints_identity(tmp_path: Path) -> None:
    before = write_checkpoint(tmp_path / "step1", TENSORS)
    (tmp_path / "step1" / "optimizer.pt").write_bytes(b"large")
    after = open_checkpoint(str(tmp_path / "step1"))
    assert after.signature == before.signature
    assert fingerprint_of(after) == fingerprint_of(before)


def test_a_touched_file_changes_the_signature_and_not_the_fingerprint(tmp_path: Path) -> None:
    before = write_checkpoint(tmp_path / "step1", TENSORS)
    fingerprint = fingerprint_of(before)
    make_older(tmp_path / "step1", 1800)
    after = open_checkpoint(str(tmp_path / "step1"))
    assert after.signature != before.signature
    assert fingerprint_of(after) == fingerprint


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_another_content_of_equal_size_is_another_fingerprint(tmp_path: Path, file: str) -> None:
    before = fingerprint_of(write_checkpoint(tmp_path / "step1", TENSORS))
    data = bytearray((tmp_path / "step1" / file).read_bytes())
    data[-2] ^= 1
    (tmp_path / "step1" / file).write_bytes(data)
    assert fingerprint_of(open_checkpoint(str(tmp_path / "step1"))) != before


def test_a_fingerprint_is_the_same_from_s3_and_however_it_was_read(
    tmp_path: Path, moto_s3: S3Server
) -> None:
    local = write_checkpoint(tmp_path / "step1", TENSORS, shards=2)
    remote = S3Store("bucket", f"{tmp_path.name}/step1")
    for path in (tmp_path / "step1").iterdir():
        remote.write(path.name, path.read_bytes())
    assert fingerprint_of(open_checkpoint(remote.uri)) == fingerprint_of(local)
    assert load(local).fingerprint == fingerprint_of(local)


def test_loading_gives_the_tensors_that_were_saved(tmp_path: Path) -> None:
    loaded = load(write_checkpoint(tmp_path / "step1", TENSORS, shards=2)).state_dict
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], values) for name, values in TENSORS.items())


def test_nan_is_named_by_checkpoint_and_tensor(tmp_path: Path) -> None:
    bad = {**TENSORS, "b": torch.tensor([1.0, float("nan"), float("inf")])}
    with pytest.raises(NonFiniteValues, match=r"step1: tensor 'b' has 2 NaN or Inf values of 3"):
        load(write_checkpoint(tmp_path / "step1", bad))


def test_a_checkpoint_that_was_written_again_is_not_mistaken_for_the_listed_one(
    tmp_path: Path,
) -> None:
    listed = write_checkpoint(tmp_path / "step1", TENSORS)
    make_older(tmp_path / "step1", 60)
    with pytest.raises(ChangedCheckpoint):
        fingerprint_of(listed)
    with pytest.raises(ChangedCheckpoint):
        open_checkpoint(listed.uri, listed.signature)


def test_an_index_that_names_a_tensor_in_the_wrong_shard_is_damage(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step1", TENSORS, shards=2)
    index = tmp_path / "step1" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = content["weight_map"]["b"]
    index.write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpoint, match="which does not hold it"):
        read_layout(open_checkpoint(checkpoint.uri))


def test_a_known_checkpoint_is_not_looked_into_again(tmp_path: Path) -> None:
    """Its header is overwritten under the same size and time: nobody reads it."""
    known = write_checkpoint(tmp_path / "step1", TENSORS)
    file = tmp_path / "step1" / "model.safetensors"
    kept = tmp_path / "kept"
    shutil.copy2(file, kept)
    file.write_bytes(b"\xff" * kept.stat().st_size)
    shutil.copystat(kept, file)
    assert names(look(tmp_path, known={known.signature})) == ["step1"]
    assert names(look(tmp_path)) == []
