"""The doctor, with a real Prefect server, a real MLflow server, Git and DVC; and the exporter."""

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings

from ckptfuse.checks import Check
from ckptfuse.params_loading import load_params
from ckptfuse.service import Service, open_service
from ckptfuse.steps.look import look_file
from flows.watch import look
from infra.native.postgres import free_port
from tasks.checks.ledger import ledger
from tasks.checks.prefect import prefect
from tasks.checks.registry import registry
from tasks.deployments import GPUS
from tasks.ledger import Ledger
from tasks.version import ledger_of
from tests.conftest import BINARIES, Project, Trajectory, make_project
from tests.helpers import write_checkpoint


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project that nothing has run in yet; its text is a few lines, its checkpoint a tensor."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(30)))
    made = make_project(tmp_path / "project", Trajectory(tmp_path, {"text": text}))
    write_checkpoint(made.bucket / "checkpoint-100", {"w": torch.zeros(1000)})
    return made


def change(project: Project, **sections: object) -> None:
    file = Path(project.params_file)
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **sections}))


def service_of(project: Project) -> Service:
    return open_service(load_params(Path(project.params_file)))


def states(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def run(folder: Path, *command: str | Path) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


# -- the command ---------------------------------------------------------------------------------


def test_a_sound_project_is_told_check_by_check(project: Project, prefect_server: str) -> None:
    named = {"PREFECT_API_URL": prefect_server, "CKPTFUSE_TRAJECTORY": "not-deployed"}
    said = project.cli("doctor", **named).stdout
    assert "ok       bucket is read: " in said
    assert "holds 1 checkpoints" in said
    assert "ok       corpus: text: 1 files" in said
    assert "ok       workspace locks: a second lock was refused" in said
    assert "ok       clock of Prefect: this clock and the server's agree" in said
    assert f"ok       Prefect server: {prefect_server} answers" in said
    assert "warning  deployments: the server has no watch/not-deployed" in said
    assert "ckptfuse deploy" in said
    assert "mlflow.db" in said
    assert "ok       Git: git version" in said
    assert "ok       DVC: dvc 3." in said
    assert not list(project.workspace.rglob("*doctor*"))


def test_whatever_is_broken_is_told_at_once_with_how_to_mend_it(project: Project) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    change(
        project,
        bucket="none",
        corpus={"domains": {"a": {"path": "none.jsonl"}}},
        mlflow={"tracking_uri": nowhere},
        ledger={"remote": str(project.folder / "none.git")},
        scoring={"device": "cuda"},
    )
    began = time.monotonic()
    done = project.cli(
        "doctor", "--json", status=1, PREFECT_API_URL=f"{nowhere}/api", CUDA_VISIBLE_DEVICES=""
    )
    assert time.monotonic() - began < 60
    told = json.loads(done.stdout)
    assert told["healthy"] is False
    failed = {check["name"]: check for check in told["checks"] if check["state"] == "failed"}
    assert set(failed) == {
        "bucket is read", "corpus", "GPU", "Prefect server", "MLflow", "Git remote",
    }  # fmt: skip
    assert "no such folder" in failed["bucket is read"]["said"]
    assert nowhere in failed["MLflow"]["said"]
    assert all(check["mend"] for check in failed.values())
    assert "6 checks failed" in done.stderr


def test_a_workspace_that_can_be_none_is_one_finding_among_others(project: Project) -> None:
    change(project, workspace="params.yaml")
    told = json.loads(project.cli("doctor", "--json", status=1).stdout)["checks"]
    found = {check["name"]: check["state"] for check in told}
    assert found["workspace writes once"] == "failed"
    assert found["bucket is read"] == found["MLflow"] == "ok"


# -- Prefect -------------------------------------------------------------------------------------


def deployed(name: str, *, hands_over: bool) -> list[Check]:
    server, clock, *found = prefect(name, f"{GPUS}-of-a-test", hands_over=hands_over)
    assert {server.state, clock.state} == {"ok"}
    return found


def test_a_deployment_is_followed_to_its_schedule_its_worker_and_its_limit(
    prefect_server: str,
) -> None:
    name = "doctored"
    every = DeploymentScheduleCreate(
        schedule=IntervalSchedule(interval=timedelta(minutes=1)), active=True
    )
    with get_client(sync_client=True) as client:
        (nothing,) = deployed(name, hands_over=True)
        assert nothing.state == "failed"
        assert f"no score/{name}" in nothing.said
        for pool in ("doctored", "doctored-gpu"):
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        for flow, pool in (("watch", "doctored"), ("score", "doctored-gpu")):
            client.create_deployment(
                client.create_flow_from_name(flow), name, work_pool_name=pool, schedules=[every]
            )
        found = {check.name: check for check in deployed(name, hands_over=True)}
        assert found["limit on GPUs"].state == "failed"
        assert "no score run can start" in found["limit on GPUs"].said
        assert found["workers"].state == "warning"
        assert "no worker serves doctored, no worker serves doctored-gpu" in found["workers"].said
        client.upsert_global_concurrency_limit_by_name(f"{GPUS}-of-a-test", 2)
        for pool in ("doctored", "doctored-gpu"):
            client._client.post(
                f"/work_pools/{pool}/workers/heartbeat", json={"name": "a worker"}
            ).raise_for_status()
        found = {check.name: check for check in deployed(name, hands_over=True)}
        assert set(found) == {"deployments", "workers", "limit on GPUs"}
        assert {check.state for check in found.values()} == {"ok"}, found
        client.update_work_pool("doctored-gpu", WorkPoolUpdate(is_paused=True))
        paused = {check.name: check for check in deployed(name, hands_over=True)}["workers"]
        assert paused.state == "warning"
        assert paused.said == f"doctored-gpu is paused: runs of {name} wait"
        assert paused.mend == "prefect work-pool resume doctored-gpu"
        client.delete_deployment(client.read_deployment_by_name(f"watch/{name}").id)
        by_hand = {check.name: check for check in deployed(name, hands_over=True)}
        assert by_hand["deployments"].state == "warning"
        assert by_hand["workers"].state == "warning"


def test_without_a_server_no_work_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        (inline,) = prefect("doctored", GPUS, hands_over=False)
        (handed,) = prefect("doctored", GPUS, hands_over=True)
    assert (inline.state, handed.state) == ("ok", "failed")
    assert "set PREFECT_API_URL" in str(handed.mend)


# -- MLflow --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [BINARIES / "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
         "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, "the MLflow server ended at once"
                time.sleep(0.2)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


@pytest.mark.faults  # not for what it breaks, but for how long such a server takes to start
def test_an_mlflow_server_answers_with_its_version(project: Project, mlflow_server: str) -> None:
    change(project, mlflow={"tracking_uri": mlflow_server})
    (check,) = registry(service_of(project))
    assert check.state == "ok", check
    assert f"{mlflow_server} answers; server 3." in check.said


def test_a_server_that_is_not_mlflows_is_told(project: Project, prefect_server: str) -> None:
    change(project, mlflow={"tracking_uri": prefect_server})
    (check,) = registry(service_of(project))
    assert check.state == "failed"
    assert "correct mlflow.tracking_uri" in str(check.mend)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("abc", "MLflow keeps no registry any more"),
        ("file:///nowhere/abc", "MLflow keeps no registry any more"),
        ("gs://abc", "unsupported URI"),
        ("postgresql://user:secret@127.0.0.1:1/mlflow", "refused"),
    ],
)
def test_a_place_that_mlflow_keeps_no_registry_in_is_told(
    project: Project, uri: str, said: str
) -> None:
    change(project, mlflow={"tracking_uri": uri})
    (check,) = registry(service_of(project))
    assert check.state == "failed", check
    assert said in check.said
    assert "secret" not in check.said
    assert "mlflow.tracking_uri" in str(check.mend)
    assert not Path("abc").exists()


# -- the ledger ----------------------------------------------------------------------------------


def test_remotes_of_git_and_dvc_are_tried_and_left_as_they_were(
    project: Project, tmp_path: Path
) -> None:
    remote, store = tmp_path / "remote.git", tmp_path / "store"
    run(tmp_path, "git", "init", "--quiet", "--bare", remote)
    store.mkdir()
    change(project, ledger={"remote": str(remote), "dvc_remote": str(store)})
    found = list(ledger(service_of(project)))
    assert states(found) == {
        "Git": "ok", "Git remote": "ok", "DVC": "ok", "DVC remote": "ok",
    }, found  # fmt: skip
    assert f"{store}: a file was written, read and deleted" in found[-1].said
    assert list(store.iterdir()) == []
    assert not run(remote, "git", "for-each-ref")


def test_a_dvc_that_may_not_write_its_notes_is_told(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", "/proc/dvc")
    (check,) = [c for c in ledger(service_of(project)) if c.name == "DVC"]
    assert check.state == "failed", check
    assert "/proc/dvc" in check.said
    assert "DVC_SITE_CACHE_DIR" in str(check.mend)


def git_remote(project: Project) -> Check:
    (check,) = [c for c in ledger(service_of(project)) if c.name == "Git remote"]
    return check


def test_a_git_remote_that_would_refuse_the_ledger_is_told(
    project: Project, tmp_path: Path
) -> None:
    remote = tmp_path / "project" / "remote.git"
    run(tmp_path, "git", "init", "--quiet", "--bare", "--initial-branch=main", remote)
    change(project, ledger={"remote": "remote.git"})  # beside params.yaml
    own = ledger_of(service_of(project))
    own.prepare(None)
    assert git_remote(project).state == "ok"
    other = Ledger(tmp_path / "other")
    other.prepare(None)
    other.git("commit", "--quiet", "--allow-empty", "--message", "another's")
    other.git("push", "--quiet", str(remote), "main")
    there = run(remote, "git", "for-each-ref")
    refused = git_remote(project)
    assert refused.state == "failed"
    assert "[rejected]" in refused.said
    assert "ledger.remote of its own" in str(refused.mend)
    assert run(remote, "git", "for-each-ref") == there


@pytest.mark.parametrize("remote", ["missing.git", "git@localhost.invalid:run.git"])
def test_a_git_remote_that_is_not_there_is_told(project: Project, remote: str) -> None:
    change(project, ledger={"remote": remote})
    check = git_remote(project)
    assert check.state == "failed"
    assert remote in check.said
    assert "correct ledger.remote" in str(check.mend)


def test_a_look_whose_flow_run_cannot_begin_is_counted_as_unfinished(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(params_file: str) -> None:
        raise RuntimeError("Failed to reach API")

    monkeypatch.setattr("flows.watch.watch", down)
    monkeypatch.setattr("flows.watch.start_server", lambda: None)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            look(project.params_file)
    last = look_file(service_of(project)).last()
    assert last is not None
    assert (last.unfinished, last.ended) == (2, None)


# -- the exporter --------------------------------------------------------------------------------


def test_the_exporter_serves_what_once_prints_with_no_server_up(project: Project) -> None:
    dead = {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}
    once = project.cli("metrics", "--once", **dead).stdout
    assert 'ckptfuse_look_interval_seconds{trajectory="trial"} 60.0' in once
    exporter = subprocess.Popen(
        [BINARIES / "ckptfuse", "metrics", "--port", "0"],
        cwd=project.folder, env={**os.environ, **dead}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert exporter.stderr is not None
        told = exporter.stderr.readline()
        url = told.split()[-1]
        served = urllib.request.urlopen(url, timeout=10).read().decode()
    finally:
        exporter.terminate()
        assert exporter.wait(timeout=10) == 128 + signal.SIGTERM
    names, same = (
        [line.split("{")[0] for line in page.splitlines() if not line.startswith("#")]
        for page in (once, served)
    )
    assert names == same
    assert url.startswith("http://127.0.0.1:")


def test_a_port_that_is_taken_is_told(project: Project) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        told = project.cli("metrics", "--port", port, status=1).stderr
    assert f"cannot listen at 127.0.0.1:{port}" in told
