"""One contract for bytes at a URI, held by a folder and by two S3 servers of different kinds."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from ckptfuse.errors import ConfigurationError, MissingFile, StoreError
from ckptfuse.store import (
    TEMPORARY_PREFIX,
    FolderStore,
    S3Store,
    Store,
    open_store,
    read_uri,
    split_uri,
)
from tests.servers import S3Server


@pytest.fixture(params=["folder", "moto", "rclone"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return FolderStore(tmp_path)
    request.getfixturevalue(f"{request.param}_s3")
    return open_store(f"s3://bucket/{tmp_path.name}")


def test_what_is_written_is_read_listed_and_described(store: Store) -> None:
    store.write("a/one.txt", b"one")
    store.write("two.txt", b"second")
    assert store.read("a/one.txt") == b"one"
    assert [(entry.path, entry.size) for entry in store.list("")] == [
        ("a/one.txt", 3),
        ("two.txt", 6),
    ]
    assert store.stat("two.txt").size == 6


def test_a_listing_by_prefix_is_sorted_and_leaves_out_the_rest(store: Store) -> None:
    for name in ("b/2", "b/10", "bc/1", "a/1"):
        store.write(name, b"x")
    assert [entry.path for entry in store.list("b/")] == ["b/10", "b/2"]
    assert [entry.path for entry in store.list("b")] == ["b/10", "b/2", "bc/1"]


def test_a_range_is_read_exactly(store: Store) -> None:
    store.write("digits", b"0123456789")
    assert bytes(store.read_range("digits", 3, 4)) == b"3456"
    assert bytes(store.read_range("digits", 9, 1)) == b"9"
    assert bytes(store.read_range("digits", 4, 0)) == b""


def test_a_range_beyond_the_end_is_an_error_and_no_short_answer(store: Store) -> None:
    store.write("digits", b"0123456789")
    with pytest.raises(StoreError):
        store.read_range("digits", 8, 5)


def test_a_missing_file_is_named(store: Store) -> None:
    store.write("present", b"x")
    for ask in (store.read, store.stat, lambda path: store.read_range(path, 0, 1)):
        with pytest.raises(MissingFile, match="absent"):
            ask("absent")


def test_writing_again_replaces_the_content_and_changes_the_version(store: Store) -> None:
    store.write("file", b"first")
    before = store.stat("file")
    store.write("file", b"other")
    assert store.read("file") == b"other"
    assert store.stat("file").version != before.version


def test_an_unchanged_file_keeps_its_version(store: Store) -> None:
    store.write("file", b"first")
    (listed,) = store.list("")
    assert listed.version == store.stat("file").version


def test_a_large_stream_arrives_whole(store: Store) -> None:
    """More than two parts of an S3 multipart upload, in pieces of odd size."""
    piece = bytes(range(251)) * 4_099
    with store.writer("large") as out:
        for _ in range(20):
            out.write(piece)
    assert store.stat("large").size == 20 * len(piece)
    assert bytes(store.read_range("large", 19 * len(piece), len(piece))) == piece
    assert store.read("large") == piece * 20


def break_off(store: Store, path: str, size: int) -> None:
    """Write ``size`` bytes to a stream and fail."""
    with store.writer(path) as out:
        out.write(b"x" * size)
        raise RuntimeError("the disk of the writer is full")


@pytest.mark.parametrize("size", [1_000, 20_000_000], ids=["one part", "two parts"])
def test_a_stream_that_breaks_off_leaves_what_was_there_before(store: Store, size: int) -> None:
    store.write("kept", b"earlier")
    for path in ("kept", "new"):
        with pytest.raises(RuntimeError, match="full"):
            break_off(store, path, size)
    assert [entry.path for entry in store.list("")] == ["kept"]
    assert store.read("kept") == b"earlier"


def test_a_stream_is_not_to_be_seen_before_its_end(store: Store) -> None:
    with store.writer("inner/file") as out:
        out.write(b"x" * 20_000_000)
        assert store.list("") == []
        with pytest.raises(MissingFile):
            store.stat("inner/file")
    assert [(entry.path, entry.size) for entry in store.list("")] == [("inner/file", 20_000_000)]


def test_a_stream_of_nothing_is_an_empty_file(store: Store) -> None:
    with store.writer("empty"):
        pass
    assert store.read("empty") == b""
    assert store.stat("empty").size == 0


def test_odd_names_come_back_as_they_were(store: Store) -> None:
    names = ["a b+c&d=e", "déjà vu/x", "per%20cent", "hash#tag"]
    for name in names:
        store.write(name, name.encode())
    assert [entry.path for entry in store.list("")] == sorted(names)
    assert [store.read(name) for name in names] == [name.encode() for name in names]


def test_an_upload_that_breaks_off_is_not_left_to_be_paid_for(moto_s3: S3Server) -> None:
    store = open_store("s3://bucket/abort")
    with store.writer("whole") as out:
        out.write(b"x" * 20_000_000)
        assert uploads() == ["abort/whole"]
    with pytest.raises(RuntimeError, match="full"):
        break_off(store, "broken", 20_000_000)
    assert uploads() == []


def uploads() -> list[str]:
    """The keys of uploads that the server holds and that have not ended."""
    answer = boto3.client("s3").list_multipart_uploads(Bucket="bucket")
    return [upload["Key"] for upload in answer.get("Uploads", [])]


def test_deleting_twice_is_no_error(store: Store) -> None:
    store.write("file", b"x")
    store.delete("file")
    store.delete("file")
    assert store.list("") == []


def test_a_child_is_the_store_of_a_folder_inside(store: Store) -> None:
    store.child("inner").write("file", b"x")
    assert store.read("inner/file") == b"x"
    assert store.child("inner").uri == f"{store.uri}/inner"


def test_more_files_than_one_page_of_a_listing_are_all_there(moto_s3: S3Server) -> None:
    store = S3Store("bucket", "many")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: store.write(f"{number:05}", b""), range(1_001)))
    assert [entry.path for entry in store.list("")] == [f"{n:05}" for n in range(1_001)]


def test_a_folder_hides_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY_PREFIX}of-a-killed-process").write_bytes(b"half")
    assert FolderStore(tmp_path).list("") == []


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/passwd"])
def test_a_folder_does_not_let_a_path_out(tmp_path: Path, path: str) -> None:
    with pytest.raises(StoreError, match="outside"):
        FolderStore(tmp_path / "in").read(path)


def test_a_missing_folder_is_no_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        FolderStore(tmp_path / "absent").list("")


def test_a_missing_bucket_is_named(moto_s3: S3Server) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        open_store("s3://nowhere/prefix").list("")


def test_a_wrong_secret_is_told_without_showing_it(
    rclone_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    rclone_s3.use(monkeypatch, AWS_SECRET_ACCESS_KEY="not-the-secret")
    with pytest.raises(StoreError, match="credentials") as told:
        open_store("s3://bucket/x").list("")
    assert "not-the-secret" not in str(told.value)


def test_no_credentials_at_all_are_told(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    moto_s3.use(monkeypatch, AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    with pytest.raises(ConfigurationError, match="credentials"):
        open_store("s3://bucket/x").list("")


def test_a_server_that_does_not_answer_is_named(
    moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    moto_s3.use(monkeypatch, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9"):
        open_store("s3://bucket/x").list("")


def test_a_folder_needs_no_boto3() -> None:
    program = (
        "import sys, ckptfuse.store as s; s.open_store('.').list(); print('boto3' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "False"


def test_uris_are_split_into_folder_and_name() -> None:
    assert split_uri("s3://b/a/x.jsonl") == ("s3://b/a", "x.jsonl")
    assert split_uri("/data/x.jsonl") == ("/data", "x.jsonl")
    assert split_uri("x.jsonl") == (".", "x.jsonl")
    with pytest.raises(ConfigurationError, match="names no object"):
        split_uri("s3://bucket")


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="unknown scheme"):
        open_store("gs://bucket/x")


def test_a_file_is_read_by_its_uri(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert read_uri(str(tmp_path / "file")) == b"content"
