"""Published to a tracking server with PostgreSQL behind it, artifacts and DVC's data on S3.

Real processes, in the order of a bad day: the server is not there, then hangs, then serves. What
had waited is published once, straight into the bucket: the server has no credentials for it.
"""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

import tasks.tracking
from ckptfuse.errors import PublicationError
from ckptfuse.params_loading import load_params
from ckptfuse.published import find_publication
from ckptfuse.service import open_service
from ckptfuse.store import open_store
from ckptfuse.store.s3_client import client
from flows.watch import Summary, watch
from infra.native.postgres import temporary_cluster
from tasks.aliases import promote
from tasks.chain import verify
from tests.conftest import Project, environment
from tests.relocating import copy_of
from tests.servers import S3Server, TrackingServer

pytestmark = pytest.mark.usefixtures("prefect_server")

ARTIFACTS = "s3://registry/artifacts"
DVC_REMOTE = "s3://registry/dvc"


@pytest.fixture(scope="module")
def buckets(rclone_server: S3Server) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        rclone_server.use(patch)
        client().create_bucket(Bucket="registry")
        yield
    client.cache_clear()


@pytest.fixture(scope="module")
def server(buckets: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """Not started yet."""
    with temporary_cluster() as cluster:
        cluster.create_database("mlflow")
        log = tmp_path_factory.mktemp("tracking") / "log"
        made = TrackingServer(cluster.url("mlflow"), ARTIFACTS, log)
        yield made
        made.kill()


@pytest.fixture(scope="module")
def project(
    finished: Project, server: TrackingServer, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    """The finished project with its last fusion judged but not yet in ledger and registry."""
    project = copy_of(finished, tmp_path_factory.mktemp("published") / "copy")
    for kind in ("publication", "promotion"):
        for path in (project.workspace / "records" / kind).glob("*.json"):
            if yaml.safe_load(path.read_text())["step"] == 720:
                path.unlink()
    shutil.rmtree(project.workspace / "ledger")
    params = Path(project.params_file)
    sections = {"mlflow": {"tracking_uri": server.url}, "ledger": {"dvc_remote": DVC_REMOTE}}
    params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), **sections}))
    return project


def look(project: Project) -> Summary:
    done = watch(project.params_file)
    assert (done.scored, done.verdicts) == (0, []), "nothing is decided again"
    return done


@pytest.fixture(scope="module")
def caught_up(project: Project, server: TrackingServer) -> Summary:
    """Looks of the service while the server is down, hangs, and is back; the last one."""
    down = look(project)
    assert f"{server.url} does not answer" in str(down.delayed)
    server.start()
    server.signal(signal.SIGSTOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.tracking, "PATIENCE", 1)
        hanging = look(project)
    server.signal(signal.SIGCONT)
    assert "does not answer" in str(hanging.delayed)
    assert (down.published, hanging.published) == (0, 0)
    assert "720" not in {str(r["step"]) for r in project.records("publication").values()}
    return look(project)


def version(project: Project) -> Any:
    mlflow.set_tracking_uri(load_params(Path(project.params_file)).mlflow.tracking_uri)
    (found,) = mlflow.MlflowClient().search_model_versions("name = 'trial'")
    return found


def test_what_waited_for_the_server_is_published_once(project: Project, caught_up: Summary) -> None:
    assert (caught_up.published, caught_up.delayed) == (1, None)
    assert look(project).did_nothing
    found = version(project)
    (plan,) = (plan for plan in project.plans() if plan["step"] == 720)
    assert found.tags["ckptfuse.fusion"] == plan["fusion"]
    model = mlflow.MlflowClient().get_registered_model("trial")
    assert model.aliases == {"candidate": found.version, "champion": found.version}
    (experiment,) = mlflow.MlflowClient().search_experiments(filter_string="name = 'trial'")
    runs = mlflow.MlflowClient().search_runs([experiment.experiment_id])
    assert len(runs) == 2, "the trajectory's and the fusion's"


def test_weights_went_straight_into_the_bucket_and_load_from_there(
    project: Project, caught_up: Summary
) -> None:
    source = str(version(project).source)
    model = mlflow.MlflowClient().get_logged_model(source.removeprefix("models:/"))
    assert model.artifact_location.startswith(f"{ARTIFACTS}/")
    sizes = {entry.path: entry.size for entry in open_store(model.artifact_location).list("model/")}
    (fusion,) = (f for f in project.records("fusion").values() if f["step"] == 720)
    assert sizes == {f"model/{path}": size for path, (size, _) in fusion["files"].items()}  # type: ignore[attr-defined]
    loaded = mlflow.pyfunc.load_model("models:/trial@champion")
    (answer,) = loaded.predict(["import os"], params={"max_new_tokens": 4})
    assert answer.startswith("import os")
    links = list(verify(open_service(load_params(Path(project.params_file))), "720"))
    assert {link.state for link in links} == {"holds"}, links


def test_a_fresh_clone_pulls_text_and_weights_from_the_dvc_remote(
    project: Project, caught_up: Summary, tmp_path: Path
) -> None:
    (published,) = (p for p in project.records("publication").values() if p["step"] == 720)
    clone = tmp_path / "clone"
    ledger = project.workspace / "ledger"
    subprocess.run(["git", "clone", "-q", "-b", str(published["tag"]), ledger, clone], check=True)
    pulled = subprocess.run(
        [sys.executable, "-m", "dvc", "pull", "--quiet"],
        cwd=clone,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert pulled.returncode == 0, pulled.stderr
    (made,) = (clone / "model").glob("*.safetensors")
    assert made.read_bytes() == (ledger / "model" / made.name).read_bytes()
    assert {p.stem for p in (clone / "corpus").iterdir()} == set(project.trajectory.corpus)


def test_nothing_is_promoted_while_the_server_is_down(
    project: Project, server: TrackingServer, caught_up: Summary
) -> None:
    """The last test: it leaves no server."""
    server.kill()
    service = open_service(load_params(Path(project.params_file)))
    before = project.records("promotion")
    with pytest.raises(PublicationError, match="does not answer"):
        promote(service, find_publication(service, "720"), by="someone", reason="because")
    assert project.records("promotion") == before
