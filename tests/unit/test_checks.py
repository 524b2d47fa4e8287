"""What the doctor finds out without servers of ours: bucket, workspace, clock, GPU, disk."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
import torch

from ckptfuse.checks import bucket, gpu, workspace
from ckptfuse.checks.clock import compare_clocks
from ckptfuse.errors import StoreError
from ckptfuse.params import Params, ScoringParams
from ckptfuse.service import open_service
from ckptfuse.store import open_store
from ckptfuse.store.s3_client import client
from tasks.checks.artifacts import artifacts
from tests.helpers import write_checkpoint
from tests.servers import S3Server, rclone

READ_ONLY = """{"Version": "2012-10-17", "Statement": [
  {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetObject"], "Resource": "*"}]}"""


def params(uri: str | Path) -> Params:
    return Params.model_validate({"bucket": str(uri)})


def upload(folder: Path, uri: str) -> None:
    for path in folder.iterdir():
        open_store(uri).write(path.name, path.read_bytes())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "bucket" / "checkpoint-100"
    write_checkpoint(folder, {"w": torch.zeros(1000)})
    return folder


@pytest.fixture
def reader(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Credentials that may list and read; moto checks rights from here on."""
    made = boto3.client("iam")
    made.create_user(UserName="reader")
    made.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=READ_ONLY)
    key = made.create_access_key(UserName="reader")["AccessKey"]
    url = moto_s3.environment["AWS_ENDPOINT_URL"]

    def check_after(requests: bytes) -> None:
        plain = {"Content-Type": "text/plain"}
        asked = urllib.request.Request(f"{url}/moto-api/reset-auth", requests, plain)
        urllib.request.urlopen(asked).close()

    check_after(b"0")
    moto_s3.use(
        monkeypatch,
        AWS_ACCESS_KEY_ID=key["AccessKeyId"],
        AWS_SECRET_ACCESS_KEY=key["SecretAccessKey"],
    )
    yield
    check_after(b"inf")
    moto_s3.use(monkeypatch)


# -- the bucket ----------------------------------------------------------------------------------


def test_a_folder_is_read_and_its_checkpoints_are_counted(checkpoint: Path) -> None:
    found = bucket.look(params(checkpoint.parent))
    assert found.newest == "checkpoint-100"
    assert found.size == sum(path.stat().st_size for path in checkpoint.iterdir())
    check = bucket.reading(found)
    assert check.state == "ok"
    assert "1 checkpoints; the last byte of checkpoint-100/model.safetensors" in check.said


def test_a_bucket_without_a_checkpoints_name_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "final-model").mkdir()
    (tmp_path / "final-model" / "model.safetensors").write_bytes(b"x")
    found = bucket.look(params(tmp_path))
    assert (found.newest, found.size) == (None, None)
    check = bucket.reading(found)
    assert check.state == "warning"
    assert "holds 1 files" in check.said
    assert "watch.pattern" in str(check.mend)


def test_a_folder_is_asked_for_the_right_to_write_and_left_as_it_was(checkpoint: Path) -> None:
    before = sorted(checkpoint.parent.rglob("*"))
    check = bucket.writing(open_store(checkpoint.parent))
    assert check.state == "warning"  # it is the test's own
    assert "may write" in check.said
    assert sorted(checkpoint.parent.rglob("*")) == before


def test_a_folder_of_the_systems_may_not_be_written() -> None:
    program = (
        "import os; from ckptfuse.checks import bucket; from ckptfuse.store import open_store\n"
        "os.geteuid() or os.setuid(65534)\n"
        "check = bucket.writing(open_store('/usr')); print(check.state, check.said)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("ok this user may not write to /usr"), done.stdout


@pytest.mark.usefixtures("reader")
def test_credentials_that_only_read_are_found_to_be_safe(checkpoint: Path) -> None:
    found = bucket.look(params("s3://bucket"))
    check = bucket.writing(found.bucket)
    assert check.state == "ok", check
    assert "refused to begin an upload (403)" in check.said


def test_credentials_that_may_write_are_told_of_and_nothing_is_left(
    moto_s3: S3Server, checkpoint: Path
) -> None:
    client().put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
    upload(checkpoint, "s3://bucket/run/checkpoint-100")
    before = client().list_object_versions(Bucket="bucket")
    found = bucket.look(params("s3://bucket/run"))
    assert bucket.reading(found).state == "ok"
    check = bucket.writing(found.bucket)
    assert check.state == "warning"
    assert "let an upload begin (it was given up at once" in check.said
    assert "s3:GetObject" in str(check.mend)
    after = client().list_object_versions(Bucket="bucket")
    keys = [version["Key"] for version in after["Versions"]]
    assert keys == [version["Key"] for version in before["Versions"]]
    assert "DeleteMarkers" not in after
    assert not client().list_multipart_uploads(Bucket="bucket").get("Uploads")


def test_another_kind_of_server_is_left_as_it_was_too(rclone_s3: S3Server) -> None:
    store = open_store("s3://bucket/doctor")
    store.write("checkpoint-1/x", b"x")
    assert bucket.writing(store).state == "warning"
    assert [entry.path for entry in store.list()] == ["checkpoint-1/x"]
    store.delete("checkpoint-1/x")


def test_a_server_that_serves_read_only_is_not_called_safe_for_what_it_did_not_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    (tmp_path / "served" / "bucket" / "file").write_bytes(b"x")
    with rclone(tmp_path, "--read-only") as server:
        server.use(monkeypatch)
        store = open_store("s3://bucket")
        check = bucket.writing(store)
        assert check.state in ("ok", "warning"), check
        assert [entry.path for entry in store.list()] == ["file"]
    client.cache_clear()


def test_a_wrong_secret_is_told_when_the_bucket_is_first_asked(
    rclone_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    rclone_s3.use(monkeypatch, AWS_SECRET_ACCESS_KEY="wrong")
    with pytest.raises(StoreError, match="access denied"):
        bucket.look(params("s3://bucket"))


# -- clocks --------------------------------------------------------------------------------------


def test_a_real_servers_clock_is_read(moto_s3: S3Server) -> None:
    check = bucket.clock(open_store("s3://bucket"))
    assert check.state == "ok", check
    assert "agree within" in check.said


@pytest.mark.parametrize(
    ("behind", "state", "said"),
    [
        (0, "ok", "agree within"),
        (-60, "warning", "60 s behind"),
        (60, "warning", "60 s ahead of"),
        (1000, "failed", "1000 s ahead of the server's"),
    ],
)
def test_clocks_that_differ_are_told(behind: int, state: str, said: str) -> None:
    now = float(int(time.time())) + 0.5
    check = compare_clocks("clock", formatdate(now - behind, usegmt=True), asked=now, answered=now)
    assert check.state == state
    assert said in check.said


def test_a_slow_answer_is_no_reason_to_doubt_a_clock() -> None:
    now = time.time()
    check = compare_clocks("clock", formatdate(now, usegmt=True), asked=now, answered=now + 20)
    assert check.state == "ok"


# -- the workspace -------------------------------------------------------------------------------


def test_a_local_workspace_is_sound_and_left_clean(tmp_path: Path) -> None:
    root = tmp_path / "new" / "workspace"
    found = list(workspace.workspace(root))
    assert [(check.name, check.state) for check in found] == [
        (workspace.WRITES, "ok"),
        (workspace.LOCKS, "ok"),
        (workspace.LINKS, "ok"),
    ], found
    assert list(root.iterdir()) == []


def test_the_file_system_is_named_as_the_kernel_names_it(tmp_path: Path) -> None:
    kind = subprocess.run(
        ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", tmp_path],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert workspace.file_system(tmp_path) == kind
    assert workspace.file_system(Path("/proc/self")) == "proc"


def test_room_is_counted_in_merged_models(tmp_path: Path) -> None:
    stats = os.statvfs(tmp_path)
    free = stats.f_bavail * stats.f_frsize
    plenty = workspace.space(tmp_path, free // 100, keeps_all=True)
    assert plenty.state == "ok"
    assert "stays for good" in plenty.said
    assert workspace.space(tmp_path, free // 3, keeps_all=False).state == "warning"
    full = workspace.space(tmp_path, free * 2, keeps_all=False)
    assert full.state == "failed"
    assert "room for 0 merged models" in full.said
    assert workspace.space(tmp_path, None, keeps_all=True).state == "ok"


# -- the GPU -------------------------------------------------------------------------------------


def test_a_service_that_scores_on_the_cpu_needs_no_gpu() -> None:
    assert gpu.gpu(ScoringParams(device="cpu"), None).state == "ok"


def test_a_machine_without_a_gpu_is_told_by_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.gpu(ScoringParams(device="auto"), None).state == "warning"
    check = gpu.gpu(ScoringParams(device="cuda"), None)
    assert check.state == "failed"
    assert "shows none" in check.said


@pytest.mark.skipif(torch.version.cuda is not None, reason="asks a CPU build of torch")
def test_a_cpu_build_of_torch_beside_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    check = gpu.gpu(ScoringParams(device="cuda"), None)
    assert check.state == "failed"
    assert "is built for CPUs" in check.said
    assert "constraints.txt" in str(check.mend)


@pytest.mark.skipif(torch.version.cuda is not None, reason="asks a CPU build of torch")
def test_a_gpu_that_no_kernel_can_be_compiled_for_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says what it would say of a GPU; that there is no Triton here is true."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    memory = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: memory)
    monkeypatch.setattr(gpu, "_does_not_compute", lambda index: None)
    before = dict(os.environ)
    check = gpu.gpu(ScoringParams(device="cuda"), 10**9, tmp_path)
    assert check.state == "warning"
    assert "1 x a GPU" in check.said
    assert "no kernel can be compiled (ModuleNotFoundError: " in check.said
    assert "gcc python3-dev" in str(check.mend)
    assert dict(os.environ) == before
    assert not list(tmp_path.iterdir())


# -- where artifacts go --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "state", "said"),
    [
        ("{folder}", "ok", "a file was written, read and deleted"),
        ("s3://bucket/artifacts", "ok", "a file was written, read and deleted"),
        ("s3://nowhere/run", "failed", "the bucket 'nowhere' does not exist"),
        ("s3://no where/run", "failed", "no valid name of an S3 bucket"),
        ("zz://a/b", "failed", "zz://a/b"),
        ("hdfs://a/b", "warning", "writing there is not tried here"),
    ],
)
def test_the_place_of_artifacts_is_tried_and_left_as_it_was(
    moto_s3: S3Server, tmp_path: Path, root: str, state: str, said: str
) -> None:
    place = root.format(folder=tmp_path)
    named = {"workspace": str(tmp_path / "own"), "mlflow": {"artifact_root": place}}
    (check,) = artifacts(open_service(Params.model_validate(named)))
    assert check.state == state, check
    assert said in check.said
    assert not list(tmp_path.iterdir())
    assert not open_store("s3://bucket/artifacts").list()


def test_without_a_place_of_their_own_artifacts_are_the_servers_affair(tmp_path: Path) -> None:
    assert not list(artifacts(open_service(Params(workspace=str(tmp_path)))))
