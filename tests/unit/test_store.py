"""One contract for bytes at a URI, held by a folder and by two S3 servers of different kinds."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
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
    absolute_uri,
    open_store,
    read_uri,
    split_uri,
)
from ckptfuse.store.multipart import group_size
from tests.helpers import as_nobody
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


def test_folders_at_the_top_are_named_without_what_is_in_them(store: Store) -> None:
    for name in ("b/2", "b/deep/3", "a/1", "at the top"):
        store.write(name, b"x")
    assert store.folders() == ("a", "b")
    assert store.child("b").folders() == ("deep",)


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


LEAF = 8 * 1024 * 1024


def pattern(size: int) -> bytes:
    """Bytes in which no two places of the same file look alike for long."""
    return (b"".join(i.to_bytes(4, "big") for i in range(50_021)) * (size // 200_084 + 1))[:size]


@pytest.mark.parametrize("size", [0, 5, LEAF, LEAF + 1, 3 * LEAF + 12_345])
def test_parts_in_any_order_from_any_thread_make_the_file(store: Store, size: int) -> None:
    data = pattern(size)
    starts = list(range(0, size, LEAF))[::-1]
    with store.part_writer("parts", size, LEAF) as out, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: out.write_at(start, part(data, start)), starts))
        assert store.list("") == []
    assert store.read("parts") == data


def part(data: bytes, start: int, size: int = LEAF) -> memoryview:
    return memoryview(data)[start : start + size]


def test_small_parts_are_gathered_into_such_as_s3_takes(moto_s3: S3Server) -> None:
    store, piece = open_store("s3://bucket/gathered"), 1024 * 1024
    data = pattern(12 * piece + 7)
    with store.part_writer("file", len(data), piece) as out:
        for start in [*range(0, len(data), 2 * piece), *range(piece, len(data), 2 * piece)]:
            out.write_at(start, part(data, start, piece))
    assert store.read("file") == data
    assert store.stat("file").version.endswith("-3")  # ETag of three parts: 5, 5 and 2 MiB


@pytest.mark.parametrize("terabytes", [0.01, 0.08, 1, 5])
def test_s3s_parts_stay_within_its_limits_up_to_the_largest_object(terabytes: float) -> None:
    size = int(terabytes * 1024**4)
    part_size = LEAF * group_size(size, LEAF)
    assert 5 * 1024**2 <= part_size <= 5 * 1024**3
    assert -(-size // part_size) <= 10_000


def test_an_object_larger_than_s3_takes_is_refused_at_once() -> None:
    store = open_store("s3://bucket/x")
    with pytest.raises(StoreError, match="exceed"), store.part_writer("f", 6 * 1024**4, LEAF):
        pass


def write_parts(store: Store, size: int, starts: Iterable[int]) -> None:
    with store.part_writer("file", size, LEAF) as out:
        for start in starts:
            out.write_at(start, memoryview(bytes(LEAF)))


@pytest.mark.parametrize("lacking", [1, 2])
def test_a_file_that_lacks_a_part_does_not_appear(moto_s3: S3Server, lacking: int) -> None:
    store = open_store("s3://bucket/lacking")
    with pytest.raises(StoreError, match="parts were written"):
        write_parts(store, lacking * LEAF, range(LEAF, lacking * LEAF, LEAF))
    assert store.list("") == []
    assert uploads() == []


def failing(starts: Iterable[int]) -> Iterator[int]:
    yield from starts
    raise RuntimeError("the disk of the writer is full")


def test_parts_that_break_off_leave_nothing_behind(store: Store) -> None:
    with pytest.raises(RuntimeError, match="full"):
        write_parts(store, 4 * LEAF, failing([LEAF, 0]))
    assert store.list("") == []


def without_its_upload(starts: Iterable[int]) -> Iterator[int]:
    """Someone, or a rule of the bucket, removes the upload while it goes on."""
    (upload,) = boto3.client("s3").list_multipart_uploads(Bucket="bucket")["Uploads"]
    boto3.client("s3").abort_multipart_upload(
        Bucket="bucket", Key=upload["Key"], UploadId=upload["UploadId"]
    )
    yield from starts


def test_an_upload_that_the_store_refuses_is_told(
    moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto_s3.use(monkeypatch, AWS_MAX_ATTEMPTS="2")
    store = open_store("s3://bucket/refused")
    with pytest.raises(StoreError, match="refused/file"):
        write_parts(store, 20 * LEAF, without_its_upload(range(0, 20 * LEAF, LEAF)))
    assert store.list("") == []
    assert uploads() == []


class Cutting:
    """Between client and server: cuts each connection once it brought so many bytes."""

    def __init__(self, target: str, after: int) -> None:
        self._address = ("127.0.0.1", int(target.rpartition(":")[2]))
        self._after = after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            far = socket.create_connection(self._address)
            threading.Thread(target=self._pass, args=(near, far, None), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, self._after), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket, most: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while (data := source.recv(65_536)) and (most is None or passed < most):
                sink.sendall(data)
                passed += len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


def test_a_range_whose_connection_breaks_goes_on_where_it_was(
    moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pattern(3_000_000)
    open_store("s3://bucket/cut").write("file", data)
    proxy = Cutting(moto_s3.environment["AWS_ENDPOINT_URL"], after=1_300_000)
    moto_s3.use(monkeypatch, AWS_ENDPOINT_URL=proxy.url)
    assert (
        bytes(open_store("s3://bucket/cut").read_range("file", 10, 2_900_000)) == data[10:2_900_010]
    )
    assert proxy.connections == 3
    proxy.close()


def test_a_range_that_never_comes_whole_is_given_up_and_told(
    moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store("s3://bucket/cut").write("file", pattern(3_000_000))
    proxy = Cutting(moto_s3.environment["AWS_ENDPOINT_URL"], after=100_000)
    moto_s3.use(monkeypatch, AWS_ENDPOINT_URL=proxy.url)
    with pytest.raises(StoreError, match="the connection broke 5 times"):
        open_store("s3://bucket/cut").read_range("file", 0, 3_000_000)
    proxy.close()


def test_connections_are_used_again_after_a_range(
    rclone_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store("s3://bucket/again").write("file", pattern(100_000))
    proxy = Cutting(rclone_s3.environment["AWS_ENDPOINT_URL"], after=10**9)
    rclone_s3.use(monkeypatch, AWS_ENDPOINT_URL=proxy.url)
    for _ in range(5):
        open_store("s3://bucket/again").read_range("file", 50, 90_000)
    assert proxy.connections == 1
    proxy.close()


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


def test_an_object_that_marks_a_folder_is_no_file(moto_s3: S3Server) -> None:
    from ckptfuse.store.s3_client import client

    store = open_store("s3://bucket/marked")
    store.write("step-1/model", b"weights")
    for key in ("marked/", "marked/step-1/", "marked/empty/"):
        client().put_object(Bucket="bucket", Key=key, Body=b"")
    assert [entry.path for entry in store.list()] == ["step-1/model"]
    assert [entry.path for entry in store.child("step-1").list("")] == ["model"]


def test_a_folder_hides_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY_PREFIX}of-a-killed-process").write_bytes(b"half")
    assert FolderStore(tmp_path).list("") == []


def test_a_place_is_named_from_anywhere_by_one_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("texts", f"{tmp_path}/texts/", f"file://{tmp_path}/texts"):
        assert absolute_uri(uri) == str(tmp_path / "texts")
    assert absolute_uri("s3://bucket/texts") == "s3://bucket/texts"


def test_a_file_uri_names_what_its_path_names(tmp_path: Path) -> None:
    place = tmp_path / "a space, 100%"
    place.mkdir()
    (place / "a file").write_bytes(b"here")
    assert open_store(place.as_uri()).uri == str(place)
    assert read_uri((place / "a file").as_uri()) == b"here"
    assert absolute_uri(place.as_uri()) == str(place)


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/passwd"])
def test_a_folder_does_not_let_a_path_out(tmp_path: Path, path: str) -> None:
    with pytest.raises(StoreError, match="outside"):
        FolderStore(tmp_path / "in").read(path)


def test_a_missing_folder_is_no_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        FolderStore(tmp_path / "absent").list("")


def test_a_folder_that_may_not_be_read_is_no_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "closed").mkdir()
    (tmp_path / "seen").touch()
    (tmp_path / "lost+found").chmod(0)
    (tmp_path / "closed").chmod(0)
    with as_nobody(tmp_path):
        assert FolderStore(tmp_path).names() == ("seen",)
        for ask in (FolderStore.list, FolderStore.folders):
            with pytest.raises(StoreError, match=r"closed: cannot be listed: Permission denied"):
                ask(FolderStore(tmp_path / "closed"))


def test_links_that_lead_nowhere_hide_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "step1").mkdir()
    (tmp_path / "step1" / "model").touch()
    (tmp_path / "latest").symlink_to("latest")  # in a circle
    (tmp_path / "step1" / "gone").symlink_to("nothing")
    (tmp_path / "step1" / "circle").symlink_to("circle")
    (tmp_path / "best").symlink_to("step1")
    (tmp_path / "link").symlink_to("step1/model")
    store = FolderStore(tmp_path)
    assert [entry.path for entry in store.list()] == ["link", "step1/model"]
    assert store.folders() == ("step1",)


def test_a_file_that_fails_while_it_is_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"0123")
    with FolderStore(tmp_path).reader("model") as reader:
        os.close(reader._descriptor)  # type: ignore[attr-defined]
        with pytest.raises(StoreError, match=r"model: cannot be read: Bad file descriptor"):
            reader.read_into(0, memoryview(bytearray(4)))
        reader._descriptor = os.open(tmp_path / "model", os.O_RDONLY)  # type: ignore[attr-defined]


def test_what_cannot_be_written_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(StoreError, match="cannot write"):
        FolderStore(tmp_path / "file" / "below").write("a", b"")
    with pytest.raises(StoreError, match="cannot write"):
        FolderStore(tmp_path).write("n" * 300, b"")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
