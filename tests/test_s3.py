"""The same work with everything on S3: two real servers of different kinds, on loopback."""

import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.store.artifact.s3_artifact_repo import _cached_get_s3_client

from ckptfuse.digests import content_digest
from ckptfuse.store import open_store
from ckptfuse.store.s3_client import client
from tasks import artifacts
from tests.conftest import Project, Trajectory, make_project
from tests.servers import SECRET, S3Server

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def s3(
    request: pytest.FixtureRequest, trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[S3Server]:
    """A server whose bucket ``training`` holds the first four checkpoints and the corpus.

    The corpus in forms of several kinds: a folder with Parquet, compressed lines, plain lines.
    rclone's, unless the test asks for others: it checks secrets, as the real one does.
    """
    server: S3Server = request.getfixturevalue(f"{getattr(request, 'param', 'rclone')}_server")
    server.use(monkeypatch)
    names = [bucket["Name"] for bucket in client().list_buckets()["Buckets"]]
    if "training" not in names:
        client().create_bucket(Bucket="training")
        for step in trajectory.steps()[:4]:
            upload(trajectory.bucket / f"checkpoint-{step}", f"s3://training/run/checkpoint-{step}")
        corpus = open_store("s3://training/corpus")
        texts = {name: path.read_bytes() for name, path in trajectory.corpus.items()}
        column = [json.loads(line)["text"] for line in texts["c"].splitlines()]
        pq.write_table(pa.table({"text": column}), parquet := io.BytesIO())
        corpus.write("c/part-0.parquet", parquet.getvalue())
        corpus.write("prose.jsonl.gz", gzip.compress(texts["prose"]))
        corpus.write("python.jsonl", texts["python"])
    yield server
    client.cache_clear()


def upload(folder: Path, uri: str) -> None:
    target = open_store(uri)
    for path in sorted(folder.iterdir()):
        target.write(path.name, path.read_bytes())


def on_s3(folder: Path, trajectory: Trajectory) -> Project:
    """A project whose checkpoints and corpus lie on S3; its workspace is local."""
    files = {"c": "c", "prose": "prose.jsonl.gz", "python": "python.jsonl"}
    corpus = {name: Path(f"s3:/training/corpus/{file}") for name, file in files.items()}
    project = make_project(
        folder, Trajectory(trajectory.bucket, corpus), watch={"settle_seconds": 0}
    )
    text = (folder / "params.yaml").read_text().replace("s3:/training", "s3://training")
    (folder / "params.yaml").write_text(text)
    return project


@pytest.mark.parametrize(
    "s3", ["rclone", pytest.param("moto", marks=pytest.mark.faults)], indirect=True
)
def test_a_watch_of_s3_makes_the_same_fusion_as_a_watch_of_a_folder(
    s3: S3Server, finished: Project, trajectory: Trajectory, tmp_path: Path
) -> None:
    project = on_s3(tmp_path / "project", trajectory)
    done = project.cli("watch", "--once", CKPTFUSE_BUCKET="s3://training/run")
    assert "4 scored" in done.stdout
    assert "1 published" in done.stdout
    fusions = project.records("fusion")
    assert fusions
    for fusion, made in fusions.items():
        assert made["files"] == finished.records("fusion")[fusion]["files"]
    written = project.records("score")
    assert written.keys() <= finished.records("score").keys()
    again = project.cli("watch", "--once", CKPTFUSE_BUCKET="s3://training/run")
    assert "Nothing to do: 4 checkpoints" in again.stdout
    assert SECRET not in done.stderr + again.stderr
    for path in [*project.workspace.rglob("*.json"), *project.workspace.rglob("*.yaml")]:
        assert SECRET not in path.read_text()


def test_score_and_merge_take_s3_uris(s3: S3Server, trajectory: Trajectory, tmp_path: Path) -> None:
    project = on_s3(tmp_path / "project", trajectory)
    first, second = trajectory.steps()[:2]

    def score(checkpoint: str, corpus: str) -> dict[str, object]:
        told = project.cli(
            "score", checkpoint, "--corpus", f"c={corpus}", "--split", "report", "--json"
        )
        scores = json.loads(told.stdout)
        assert isinstance(scores, dict)
        return scores

    few = b"".join(trajectory.corpus["c"].read_bytes().splitlines(keepends=True)[:40])
    (tmp_path / "few.jsonl").write_bytes(few)
    open_store("s3://training/few").write("c.jsonl", few)
    local = score(str(trajectory.bucket / f"checkpoint-{first}"), str(tmp_path / "few.jsonl"))
    remote = score(f"s3://training/run/checkpoint-{first}", "s3://training/few/c.jsonl")
    assert remote["domains"] == local["domains"]
    assert remote["fingerprint"] == local["fingerprint"]

    def inputs(root: str) -> list[str]:
        return [f"{root}/checkpoint-{first}=0.25", f"{root}/checkpoint-{second}=0.75"]

    out = f"s3://training/merged-{os.urandom(4).hex()}"
    project.cli("merge", out, *inputs("s3://training/run"))
    project.cli("merge", "merged", *inputs(str(trajectory.bucket)))
    merged = project.folder / "merged"
    names = sorted(path.name for path in merged.iterdir())
    assert [entry.path for entry in open_store(out).list()] == names
    for name in names:
        remote_bytes = open_store(out).read(name)
        assert content_digest(remote_bytes) == content_digest((merged / name).read_bytes())
    told = project.cli("merge", out, *inputs("s3://training/run"), status=2)
    assert "is there already" in told.stderr


def test_what_is_wrong_with_s3_is_told_before_any_server_starts(
    s3: S3Server, trajectory: Trajectory, tmp_path: Path
) -> None:
    project = on_s3(tmp_path / "project", trajectory)
    gone = project.cli("watch", "--once", status=1, CKPTFUSE_BUCKET="s3://no-such-bucket/run")
    assert "'no-such-bucket' does not exist" in gone.stderr
    nobody = {**os.environ, "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    told = project.cli("watch", "--once", status=2, CKPTFUSE_BUCKET="s3://training/run", **{
        key: nobody[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    })  # fmt: skip
    assert "no usable AWS credentials" in told.stderr
    wrong = project.cli(
        "watch", "--once", status=1, CKPTFUSE_BUCKET="s3://training/run",
        AWS_SECRET_ACCESS_KEY="a-wrong-secret",
    )  # fmt: skip
    assert "check the AWS credentials" in wrong.stderr
    assert "a-wrong-secret" not in wrong.stderr
    assert not (project.workspace / "prefect").exists()


def test_large_weights_go_up_in_parts_and_what_is_up_is_not_uploaded_again(
    moto_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into MLflow's artifact store. A single put ends at 5 GB; parts go as far as S3 does."""
    moto_server.use(monkeypatch)
    _cached_get_s3_client.cache_clear()  # MLflow's own, which may lead to another test's server
    client().create_bucket(Bucket="registry")
    packaged, location = tmp_path / "packaged", "s3://registry/model"
    weights = packaged / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(os.urandom(20 << 20))
    (packaged / "MLmodel").write_text("first")
    artifacts.store(location, packaged)

    def tag() -> str:
        found = client().head_object(Bucket="registry", Key="model/model/model.safetensors")
        return str(found["ETag"]).strip('"')

    first = tag()
    assert first.endswith("-3"), "three parts of 8 MiB at most"
    assert open_store(location).read("model/model.safetensors") == weights.read_bytes()
    weights.write_bytes(bytes(20 << 20))  # to see whether it is uploaded
    (packaged / "MLmodel").write_text("after a kill")
    artifacts.store(location, packaged)
    assert tag() == first
    assert open_store(location).read("MLmodel") == b"after a kill"
    client.cache_clear()
    _cached_get_s3_client.cache_clear()
