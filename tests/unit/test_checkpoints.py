"""When a folder counts as a checkpoint, and what its identity covers."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckptfuse.checkpoints import (
    Checkpoint,
    check_bucket_uri,
    open_checkpoint,
)
from ckptfuse.errors import (
    ChangedCheckpoint,
    ConfigurationError,
    DamagedCheckpoint,
    IncompleteCheckpoint,
    MissingFile,
)
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.layouts import read_layout
from ckptfuse.listing import Conventions, Listing, find, look_again
from ckptfuse.store import FolderStore, open_store
from tests.helpers import CONFIG, as_nobody, make_older, write_checkpoint
from tests.servers import S3Server

TENSORS = {"a": torch.ones(3), "b": torch.zeros(2, 2), "c": torch.tensor(1.0)}
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
WEIGHTS = "model.safetensors"


def look(bucket: Path, **conventions: object) -> Listing:
    return find(FolderStore(bucket), Conventions(**conventions))  # type: ignore[arg-type]


def look_once_more(bucket: Path) -> Listing:
    """As a look does in a bucket of very many checkpoints, which remembers none of these."""
    store = FolderStore(bucket)
    return look_again(store, store.folders(), Conventions(), {}, recent=3)


def reason(bucket: Path, **conventions: object) -> str:
    """Why the bucket's only folder does not count yet."""
    listing = look(bucket, **conventions)
    assert not listing.complete
    assert not listing.damaged
    (refused,) = listing.incomplete
    return refused.reason


def damage(bucket: Path) -> str:
    """Why the bucket's only folder never will."""
    listing = look(bucket, settle_seconds=0)
    assert not listing.complete
    assert not listing.incomplete
    (refused,) = listing.damaged
    assert refused.checkpoint.signature
    return refused.reason


def signature_and_fingerprint(folder: Path) -> tuple[str, str]:
    checkpoint = open_checkpoint(str(folder))
    return checkpoint.signature, fingerprint_of(checkpoint)


# -- complete or not ---------------------------------------------------------------------------


def test_complete_checkpoints_are_listed_by_step_with_what_their_names_say(tmp_path: Path) -> None:
    for name in ("stage1-step1000-tokens4B", "stage1-step200-tokens1B"):
        write_checkpoint(tmp_path / name, TENSORS)
    listing = look(tmp_path)
    assert [(c.step, c.stage, c.tokens) for c in listing.complete] == [
        (200, "stage1", 10**9),
        (1000, "stage1", 4 * 10**9),
    ]
    assert listing.incomplete == listing.damaged == ()


def test_what_has_no_checkpoints_name_is_not_looked_at(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-100", TENSORS)
    write_checkpoint(tmp_path / "runs" / "checkpoint-300", TENSORS)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "checkpoint-200").write_text("a file and no folder")
    listing = look(tmp_path)
    assert [c.name for c in listing.complete] == ["checkpoint-100"]
    assert listing.incomplete == listing.damaged == ()


def test_a_sharded_checkpoint_counts_when_its_last_shard_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS, shards=3)
    shard = (folder / SHARD).read_bytes()
    (folder / SHARD).unlink()
    assert f"1 of 3 shards are missing, first {SHARD}" in reason(tmp_path)
    (folder / SHARD).write_bytes(shard)
    make_older(folder, 100)
    assert [c.step for c in look(tmp_path).complete] == [100]


def test_a_shard_shorter_than_its_header_says_is_still_being_written(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS, shards=3)
    whole = (folder / SHARD).read_bytes()
    for length in (0, 4, 8, 60, len(whole) - 1):
        (folder / SHARD).write_bytes(whole[:length])
        make_older(folder, 100)
        assert SHARD in reason(tmp_path)


@pytest.mark.parametrize(
    ("missing", "said"), [("config.json", "no config.json yet"), (WEIGHTS, "no model.safetensors")]
)
def test_what_is_not_there_yet_is_named(tmp_path: Path, missing: str, said: str) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS)
    (folder / missing).unlink()
    assert said in reason(tmp_path)


def test_files_must_have_been_quiet_for_a_while(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-100", TENSORS, age=20)
    assert "counts after 60 s of quiet" in reason(tmp_path, settle_seconds=60)
    assert look(tmp_path, settle_seconds=10).complete


def test_a_clock_that_runs_ahead_only_delays_and_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-100", TENSORS, age=-3600)
    assert "is dated 1:00:00 ahead of this machine's clock" in reason(tmp_path)


def test_a_file_beside_the_weights_that_is_still_written_holds_the_checkpoint_back(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS)
    (folder / "optimizer.pt").write_bytes(b"half")
    assert "of quiet" in reason(tmp_path)


def test_the_trainers_state_file_ends_the_wait_where_nothing_is_newer(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS, age=5)
    (folder / "trainer_state.json").write_text("{}")
    assert look(tmp_path).complete
    now = time.time() + 2
    (folder / "optimizer.pt").write_bytes(b"later")
    os.utime(folder / "optimizer.pt", (now, now))
    assert "of quiet" in reason(tmp_path)


def test_metadata_below_the_top_ends_no_wait(tmp_path: Path) -> None:
    """Accelerate writes the model's, and then the optimizer's, each with a .metadata."""
    write_checkpoint(tmp_path / "checkpoint-100", TENSORS, age=5)
    inner = tmp_path / "checkpoint-100" / "pytorch_model_fsdp_0"
    inner.mkdir()
    (inner / ".metadata").write_bytes(b"")
    assert "of quiet" in reason(tmp_path)


def test_in_a_bucket_the_trainers_state_ends_no_wait(tmp_path: Path, moto_s3: S3Server) -> None:
    """Files are uploaded in any order, some of them after it."""
    local = write_checkpoint(tmp_path / "checkpoint-100", TENSORS)
    bucket = open_store(f"s3://bucket/{tmp_path.name}")
    for entry in local.files:
        bucket.write(f"checkpoint-100/{entry.path}", local.store().read(entry.path))
    bucket.write("checkpoint-100/trainer_state.json", b"{}")
    (refused,) = find(bucket, Conventions(settle_seconds=60)).incomplete
    assert "of quiet" in refused.reason
    assert find(bucket, Conventions(settle_seconds=0)).complete


def test_a_marker_of_the_teams_own_decides_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS)
    assert reason(tmp_path, marker="DONE") == "waiting for the marker file 'DONE'"
    (folder / "DONE").touch()
    assert look(tmp_path, marker="DONE").complete


def test_a_marker_over_a_missing_shard_does_not_make_it_complete(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS, shards=3)
    (folder / SHARD).unlink()
    (folder / "DONE").touch()
    assert "1 of 3 shards" in reason(tmp_path, marker="DONE")


def test_a_half_written_checkpoint_does_not_hold_up_the_others(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        write_checkpoint(tmp_path / f"checkpoint-{step}", TENSORS)
    (tmp_path / "checkpoint-200" / WEIGHTS).write_bytes(b"")
    make_older(tmp_path / "checkpoint-200", 100)
    listing = look(tmp_path)
    assert [c.step for c in listing.complete] == [100, 300]
    assert [r.checkpoint.step for r in listing.incomplete] == [200]


# -- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (WEIGHTS, b"\xff" * 64, "claims a header"),
        (WEIGHTS, b"\x10" + b"\0" * 7 + b"this is no JSON!", "header is damaged"),
        ("config.json", b'{"model_type":', "not JSON"),
        ("config.json", b"\xff\xfe\xfa", "not JSON"),
        ("config.json", b"[" * 100_000, "not JSON"),
        ("config.json", b"[]", "not a JSON object"),
    ],
)
def test_a_damaged_file_is_a_reason_and_no_exception(
    tmp_path: Path, file: str, content: bytes, said: str
) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS)
    (folder / file).write_bytes(content)
    assert said in damage(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b"{}", "not a weight index"),
        (b"[" * 100_000, "not a weight index"),
        (b'{"weight_map": {"a": "../../etc/passwd"}}', "points outside"),
        (b'{"weight_map": {"z": "model-00001-of-00003.safetensors"}}', "does not hold it"),
    ],
)
def test_a_damaged_index_is_a_reason_and_no_exception(
    tmp_path: Path, index: bytes, said: str
) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS, shards=3)
    (folder / INDEX).write_bytes(index)
    assert said in damage(tmp_path)


def test_a_tensor_that_lies_in_two_shards_is_damage(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS, shards=3)
    (folder / SHARD).write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    assert "lies in two of its files" in damage(tmp_path)


def test_a_single_file_is_taken_before_an_index_as_transformers_does(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS, shards=3)
    write_checkpoint(folder, {"a": torch.ones(3)})
    layout = read_layout(open_checkpoint(str(folder)))
    assert list(layout.tensors) == ["a"]


def test_headers_of_known_checkpoints_are_not_read_again(tmp_path: Path) -> None:
    """Their weights are replaced by garbage of the same size and time: nobody notices."""
    folder = tmp_path / "checkpoint-100"
    checkpoint = write_checkpoint(folder, TENSORS)
    stamp = (folder / WEIGHTS).stat()
    (folder / WEIGHTS).write_bytes(b"\xff" * stamp.st_size)
    os.utime(folder / WEIGHTS, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    again = look(tmp_path, known=frozenset({checkpoint.signature}))
    assert again.complete == (checkpoint,)
    assert again.architectures == {}
    assert look(tmp_path).damaged


# -- identity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["optimizer.pt", "optimizer.safetensors", "rng_state.pth", "log"])
def test_optimizer_state_changes_neither_signature_nor_fingerprint(
    tmp_path: Path, file: str
) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS)
    before = signature_and_fingerprint(folder)
    (folder / file).write_bytes(b"\0" * 100)
    assert signature_and_fingerprint(folder) == before


def test_touched_weights_change_the_signature_and_not_the_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS)
    signature, print_ = signature_and_fingerprint(folder)
    make_older(folder, 50)
    touched = signature_and_fingerprint(folder)
    assert touched[0] != signature
    assert touched[1] == print_


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", b"{}"), ("generation_config.json", b"{}"), ("config.json", b'{"x": 1}')],
)
def test_files_that_travel_with_the_weights_are_part_of_both(
    tmp_path: Path, file: str, content: bytes
) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS)
    before = signature_and_fingerprint(folder)
    (folder / file).write_bytes(content)
    after = signature_and_fingerprint(folder)
    assert after[0] != before[0]
    assert after[1] != before[1]


@pytest.mark.parametrize("file", [WEIGHTS, "config.json"])
def test_one_changed_bit_is_another_fingerprint(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "checkpoint-100"
    before = fingerprint_of(write_checkpoint(folder, TENSORS))
    data = bytearray((folder / file).read_bytes())
    data[-2] ^= 1
    (folder / file).write_bytes(data)
    assert fingerprint_of(open_checkpoint(str(folder))) != before


def test_a_copy_under_another_name_has_the_same_fingerprint(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "checkpoint-100", TENSORS)
    second = write_checkpoint(tmp_path / "checkpoint-200", TENSORS)
    assert first.signature != second.signature
    assert fingerprint_of(first) == fingerprint_of(second)


def test_a_fingerprint_is_the_same_in_a_folder_and_in_a_bucket(
    tmp_path: Path, moto_s3: S3Server
) -> None:
    local = write_checkpoint(tmp_path / "checkpoint-100", TENSORS, shards=3)
    remote = open_store(f"s3://bucket/{tmp_path.name}/checkpoint-100")
    for entry in local.files:
        remote.write(entry.path, local.store().read(entry.path))
    listing = find(open_store(f"s3://bucket/{tmp_path.name}"), Conventions(settle_seconds=0))
    (found,) = listing.complete
    assert fingerprint_of(found) == fingerprint_of(local)
    assert list(listing.architectures.values()) == [read_layout(local).architecture]


def test_architecture_knows_names_shapes_and_dtypes_and_no_values(tmp_path: Path) -> None:
    def architecture(name: str, **changes: torch.Tensor) -> str:
        return read_layout(write_checkpoint(tmp_path / name, {**TENSORS, **changes})).architecture

    usual = architecture("usual")
    assert architecture("values", a=torch.full((3,), 9.0)) == usual
    sharded = write_checkpoint(tmp_path / "sharded", TENSORS, shards=3)
    assert read_layout(sharded).architecture == usual
    assert architecture("shape", a=torch.ones(4)) != usual
    assert architecture("dtype", a=torch.ones(3, dtype=torch.bfloat16)) != usual
    assert architecture("names", d=torch.ones(1)) != usual


# -- opening by hand ---------------------------------------------------------------------------


def test_a_checkpoint_written_again_since_it_was_listed_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-100"
    listed = write_checkpoint(folder, TENSORS)
    assert open_checkpoint(str(folder), listed.signature) == listed
    write_checkpoint(folder, {**TENSORS, "c": torch.tensor(2.0)}, age=50)
    with pytest.raises(ChangedCheckpoint, match="written again"):
        open_checkpoint(str(folder), listed.signature)


def test_any_folder_with_a_model_opens_whatever_its_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "my-model", TENSORS)
    assert open_checkpoint(str(tmp_path / "my-model")).step == 0
    assert open_checkpoint(f"file://{tmp_path}/my-model/").name == "my-model"


def test_an_empty_folder_and_one_without_weights_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFile, match="no files there"):
        open_checkpoint(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(IncompleteCheckpoint, match=r"no model\.safetensors"):
        open_checkpoint(str(tmp_path / "empty"))


def test_a_layout_of_damaged_weights_names_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-100"
    write_checkpoint(folder, TENSORS)
    (folder / WEIGHTS).write_bytes(b"\xff" * 64)
    with pytest.raises(DamagedCheckpoint, match=f"{folder}/{WEIGHTS}"):
        read_layout(open_checkpoint(str(folder)))


def test_no_bucket_at_all_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="CKPTFUSE_BUCKET"):
        check_bucket_uri(None)
    assert check_bucket_uri("s3://b/p") == "s3://b/p"
    assert check_bucket_uri(str(tmp_path / "x" / ".." / "y")) == str(tmp_path / "y")


def test_a_checkpoint_that_may_not_be_read_does_not_stop_the_others(tmp_path: Path) -> None:
    for step in (100, 200):
        write_checkpoint(tmp_path / f"step{step}", TENSORS)
    (tmp_path / "step100" / WEIGHTS).chmod(0)
    (tmp_path / "step200" / WEIGHTS).chmod(0o644)
    with as_nobody(tmp_path):
        listing = look(tmp_path)
    assert [checkpoint.name for checkpoint in listing.complete] == ["step200"]
    assert listing.incomplete == ()
    (refused,) = listing.unread
    assert "permission denied" in refused.reason


@pytest.mark.parametrize("look", [look, look_once_more])
def test_a_checkpoint_whose_folder_may_not_be_listed_is_told_of(
    tmp_path: Path, look: Callable[[Path], Listing]
) -> None:
    for step in (100, 200):
        write_checkpoint(tmp_path / f"step{step}", TENSORS)
    (tmp_path / "step100").chmod(0)
    (tmp_path / "step200" / WEIGHTS).chmod(0o644)
    (tmp_path / "step300").mkdir()  # empty: the trainer has just begun
    with as_nobody(tmp_path):
        listing = look(tmp_path)
    assert [checkpoint.name for checkpoint in listing.complete] == ["step200"]
    assert listing.incomplete == ()
    (refused,) = listing.unread
    assert (refused.checkpoint.name, refused.checkpoint.step) == ("step100", 100)
    assert "step100: cannot be listed: Permission denied" in refused.reason


def test_a_file_that_was_deleted_meanwhile_is_not_one_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(checkpoint: Checkpoint) -> None:
        raise MissingFile(f"{checkpoint.uri}/{WEIGHTS}: no such object")

    monkeypatch.setattr("ckptfuse.listing.read_layout", gone)
    write_checkpoint(tmp_path / "step100", TENSORS)
    assert "no such object" in reason(tmp_path)
    assert look(tmp_path).unread == ()


def test_stages_follow_one_another_whatever_their_steps(tmp_path: Path) -> None:
    names = ["stage1-step100", "stage1-step300", "stage2-step100", "stage10-step50"]
    for name in reversed(names):
        write_checkpoint(tmp_path / name, TENSORS)
    assert [checkpoint.name for checkpoint in look(tmp_path).complete] == names
