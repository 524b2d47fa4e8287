"""The service as a team deploys it: on a real Prefect server, with a worker beside it."""

import json
import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.states import Completed, Crashed, Failed

from ckptfuse.errors import ConfigurationError
from ckptfuse.params_loading import load_params
from ckptfuse.service import open_service
from ckptfuse.store import FolderStore
from flows.automations import NEWS, ZOMBIE_AFTER
from flows.deploying import POOLS, template
from flows.watch import watch
from tasks.deployments import GPUS, Attempts, Piece, hand_over
from tasks.events import tell
from tasks.trainer_callback import NotifyCallback
from tests.conftest import BINARIES, Project, Trajectory, environment, make_project
from tests.helpers import lay_modules_of_a_team

ROOT = Path(__file__).parent.parent


class Inbox(HTTPServer):
    """Takes what Apprise's ``json://`` sends."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Take)
        self.messages: list[dict[str, Any]] = []


class _Take(BaseHTTPRequestHandler):
    server: Inbox

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.messages.append(json.loads(self.rfile.read(length)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def inbox() -> Iterator[Inbox]:
    server = Inbox()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def deployed(
    prefect_server: str,
    trajectory: Trajectory,
    finished: Project,
    inbox: Inbox,
    tmp_path_factory: pytest.TempPathFactory,
) -> Project:
    """What ``finished`` is, with everything deployed; nothing has run yet, and no worker.

    Beside its parameters lie modules that have the names of ours.
    """
    science = yaml.safe_load(Path(finished.params_file).read_text())
    project = make_project(
        tmp_path_factory.mktemp("deployed") / "project",
        trajectory,
        execution="deployments",
        scoring={**science["scoring"], "device": "cpu"},
        window=science.get("window", {}),
        fuse={"shards": 2},
        watch={"interval_seconds": 3600},
    )
    lay_modules_of_a_team(project.folder)
    project.cli("deploy", "--gpus", "2", "--notify", f"json://127.0.0.1:{inbox.server_port}/")
    return project


def eventually(found: Callable[[], Any], seconds: float = 40.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
    return answer


def runs(name: str) -> list[FlowRun]:
    """Flow runs of a deployment, the latest first."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(name)
        chosen = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]))
        found = client.read_flow_runs(flow_run_filter=chosen, sort=FlowRunSort.START_TIME_DESC)
        return list(found)


# -- what is deployed --------------------------------------------------------------------------


def test_what_a_team_needs_is_on_the_server_and_deploying_again_adds_nothing(
    deployed: Project,
) -> None:
    def there() -> dict[str, Any]:
        with get_client(sync_client=True) as client:
            return {
                "automations": sorted(a.name for a in client.read_automations()),
                "limit": client.read_global_concurrency_limit_by_name(GPUS).limit,
                "pools": sorted(p.name for p in client.read_work_pools() if p.name in POOLS),
                "deployments": {
                    d.entrypoint: d for d in client.read_deployments() if d.name == "trial"
                },
            }

    first = there()
    told = deployed.cli("deploy").stdout
    assert f"limit {GPUS}: 2" in told, "what is there stays"
    again = there()
    assert first["deployments"].keys() == again["deployments"].keys()
    assert {k: first[k] for k in ("automations", "limit", "pools")} == {
        k: again[k] for k in ("automations", "limit", "pools")
    }
    assert again["limit"] == 2
    assert again["pools"] == sorted(POOLS)
    assert len(again["automations"]) == len(NEWS) + 2, "news, zombies, a checkpoint was written"

    on_pools = {e: (d.name, d.work_pool_name) for e, d in again["deployments"].items()}
    assert on_pools == {
        "flows.watch.watch": ("trial", "ckptfuse"),
        "flows.fuse.fuse_step": ("trial", "ckptfuse"),
        "flows.backfill.backfill": ("trial", "ckptfuse"),
        "flows.score.score": ("trial", "ckptfuse-gpu"),
        "flows.merge_shard.merge_shard": ("trial", "ckptfuse-gpu"),
    }
    looks = again["deployments"]["flows.watch.watch"]
    (schedule,) = looks.schedules
    assert schedule.schedule.interval.total_seconds() == 3600
    assert looks.global_concurrency_limit.limit == 1
    assert looks.concurrency_options.collision_strategy == "CANCEL_NEW"
    for deployment in again["deployments"].values():
        # The flows as they are now accept what the deployments give them.
        assert deployment.parameters == {"params_file": deployed.params_file}
        assert deployment.parameters.keys() <= deployment.parameter_openapi_schema[
            "properties"].keys()  # fmt: skip
        assert deployment.tags == ["ckptfuse"]


def test_a_run_is_called_a_zombie_only_after_several_heartbeats(deployed: Project) -> None:
    told = yaml.safe_load(template().read_text())
    for deployment in told["deployments"]:
        variables = deployment["work_pool"]["job_variables"]["env"]
        assert (
            3 * int(variables["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) < ZOMBIE_AFTER.total_seconds()
        )


def test_without_a_server_deploy_says_which_one_it_wants(deployed: Project) -> None:
    assert "PREFECT_API_URL names no server" in deployed.cli(
        "deploy", status=2, PREFECT_API_URL="").stderr  # fmt: skip
    assert "does not answer" in deployed.cli(
        "deploy", status=1, PREFECT_API_URL="http://127.0.0.1:9/api").stderr  # fmt: skip


# -- work that is handed over ------------------------------------------------------------------


@contextmanager
def a_worker(project: Project, pool: str = "ckptfuse-gpu") -> Iterator[subprocess.Popen[bytes]]:
    """One that takes two runs at a time."""
    with (project.folder / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            [BINARIES / "prefect", "worker", "start", "--pool", pool, "--limit", "2"],
            env={**environment(), "PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:  # it would take the runs of the tests that follow
            process.kill()
            process.wait()


@pytest.fixture
def worker(deployed: Project) -> Iterator[subprocess.Popen[bytes]]:
    with a_worker(deployed) as process:
        yield process


def test_a_worker_scores_what_a_watch_hands_over_and_the_records_are_the_same(
    deployed: Project, finished: Project, worker: subprocess.Popen[bytes]
) -> None:
    deployed.land(420)
    summary = watch(deployed.params_file)
    assert (summary.scored, summary.verdicts) == (1, [])
    assert_carried_out("score/trial", ["score checkpoint-420"])
    assert list((deployed.workspace / "cache" / "handed").iterdir()) == [], "answers are fetched"

    assert len(deployed.records("score")) == 3
    assert keys_and_values(deployed, "score") <= keys_and_values(finished, "score")
    assert len(deployed.records("checkpoint")) == 1
    assert deployed.records("checkpoint").keys() <= finished.records("checkpoint").keys()

    (run,) = runs("score/trial")
    eventually(lambda: "scoring checkpoint-420" in logs_of(run))
    assert watch(deployed.params_file).did_nothing
    assert len(runs("score/trial")) == 1


@pytest.mark.stack
def test_what_is_merged_judged_and_published_is_the_same(
    deployed: Project, finished: Project, worker: subprocess.Popen[bytes]
) -> None:
    steps = (420, 480, 540, 600)
    deployed.land(*(s for s in steps if not (deployed.bucket / f"checkpoint-{s}").exists()))
    assert watch(deployed.params_file).published == 1
    assert_carried_out("score/trial", [f"score checkpoint-{step}" for step in steps])
    fusions = deployed.records("fusion")  # the second, if any, has weights that the rule corrected
    shards = [f"merge step 600, shard {shard} of 2" for shard in range(2)]
    assert_carried_out("merge-shard/trial", shards * len(fusions))

    for kind in ("score", "gate"):
        assert keys_and_values(deployed, kind) <= keys_and_values(finished, kind)
    assert len(deployed.records("score")) > 5 * 3, "also of merges that the rule asked for"
    plans = 1 + len(fusions)  # before each merge, and once the last is scored
    for kind, count in {"checkpoint": 4, "plan": plans, "gate": 1, "publication": 1}.items():
        assert len(deployed.records(kind)) == count
        assert deployed.records(kind).keys() <= finished.records(kind).keys()
    for fusion, record in fusions.items():
        assert record["files"] == finished.records("fusion")[fusion]["files"], "the same bytes"


@pytest.mark.stack
@pytest.mark.timeout(900)
def test_what_a_killed_worker_was_scoring_is_scored_by_another(
    deployed: Project, finished: Project
) -> None:
    """The automation of `ckptfuse deploy` finds the run out, after four minutes of silence."""
    deployed.land(660)
    with a_worker(deployed) as first:
        command = [BINARIES / "ckptfuse", "watch", "--once"]
        look = subprocess.Popen(command, cwd=deployed.folder, env=environment())
        eventually(lambda: states_of("score checkpoint-660") == ["Running"], 240)
        first.kill()
        (run,) = (run for run in runs("score/trial") if run.name == "score checkpoint-660")
        os.kill(int(str(run.infrastructure_pid).rpartition(":")[2]), signal.SIGKILL)
    with a_worker(deployed):
        assert look.wait(timeout=700) == 0
    assert states_of("score checkpoint-660") == ["Crashed"]
    assert states_of("score checkpoint-660, attempt 2") == ["Completed"]
    (found,) = (r for r in deployed.records("checkpoint").values() if r["step"] == 660)
    own = {
        pair for pair in keys_and_values(deployed, "score") if str(found["fingerprint"]) in pair[1]
    }
    assert len(own) == 3
    assert own <= keys_and_values(finished, "score")


@pytest.mark.stack
@pytest.mark.timeout(900)
def test_a_fuse_by_hand_and_a_replay_are_runs_of_a_worker_too(
    deployed: Project, worker: subprocess.Popen[bytes]
) -> None:
    """One on CPUs, which hands to the one on GPUs what is to be scored and merged."""
    deployed.land(720)
    decided = {record["step"] for record in deployed.records("gate").values()}
    with a_worker(deployed, "ckptfuse"):
        replay = run_deployment("backfill/trial", timeout=500)
        by_hand = run_deployment("fuse-step/trial", parameters={"step": 720}, timeout=300)
    for run in (replay, by_hand):
        assert run.state is not None
        assert run.state.is_completed(), run.state.message
    gates = deployed.records("gate").values()
    assert {record["step"] for record in gates} == decided | {720}
    assert len(gates) == len(decided) + 1, "by hand the verdict is the replay's"
    assert states_of("score checkpoint-720") == ["Completed"]


def states_of(name: str) -> list[str | None]:
    return [run.state_name for run in runs("score/trial") if run.name == name]


def assert_carried_out(deployment: str, names: list[str]) -> None:
    """Each of these at its first attempt, and nothing else."""
    found = runs(deployment)
    assert sorted(run.name for run in found) == sorted(names)
    for run in found:
        assert run.state is not None
        assert run.state.is_completed()
        assert str(run.idempotency_key).endswith("-1")


def logs_of(run: FlowRun) -> list[str]:
    with get_client(sync_client=True) as client:
        chosen = {"logs": {"flow_run_id": {"any_": [str(run.id)]}}}
        return [
            line["message"] for line in client.request("POST", "/logs/filter", json=chosen).json()
        ]


def keys_and_values(project: Project, kind: str) -> set[tuple[str, str]]:
    return {(key, json.dumps(record)) for key, record in project.records(kind).items()}


@flow(persist_result=False, validate_parameters=False)
def handed_over(deployment: str, pieces: list[Piece], attempts: Attempts) -> dict[str, str]:
    """As a watch does it."""
    return hand_over(deployment, pieces, attempts)


def settle(names: dict[str, Any], seen: list[FlowRun]) -> None:
    """In the place of a worker: end each new run of a name with the next of its states."""
    while any(names.values()):
        for run in runs("merge-shard/trial"):
            if run.id in {known.id for known in seen} or not names.get(run.name.split(",")[0]):
                continue
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(run.id, names[run.name.split(",")[0]].pop(0), force=True)
            seen.append(run)
        time.sleep(0.1)


def test_a_run_that_crashed_is_tried_again_and_one_that_failed_is_not(
    deployed: Project, tmp_path: Path
) -> None:
    pieces = [
        Piece("killed", "a killed one", {"plan": "p", "shard": 0}),
        Piece("wrong", "a wrong one", {"plan": "p", "shard": 1}),
    ]
    attempts = Attempts(FolderStore(tmp_path))
    seen: list[FlowRun] = []
    ends = {"a killed one": [Crashed(), Completed()], "a wrong one": [Failed(message="no plan p")]}
    other = threading.Thread(target=settle, args=(ends, seen))
    other.start()
    failures = handed_over("merge-shard/trial", pieces, attempts)
    other.join()
    assert list(failures) == ["wrong"]
    assert "no plan p" in failures["wrong"]
    keys = sorted(str(run.idempotency_key) for run in seen)
    assert keys == ["killed-1", "killed-2", "wrong-1"]
    (second,) = [run for run in seen if run.idempotency_key == "killed-2"]
    assert second.name == "a killed one, attempt 2"

    ends = {"a wrong one": [Completed()]}
    other = threading.Thread(target=settle, args=(ends, seen))
    other.start()
    assert handed_over("merge-shard/trial", pieces[1:], attempts) == {}, "a later look tries again"
    other.join()
    assert seen[-1].idempotency_key == "wrong-2"


def test_a_trajectory_that_was_never_deployed_is_told(deployed: Project, tmp_path: Path) -> None:
    piece = Piece("key", "score nothing", {"request": "key"})
    with pytest.raises(ConfigurationError, match=r"no deployment score/other.* `ckptfuse deploy`"):
        handed_over("score/other", [piece], Attempts(FolderStore(tmp_path)))


# -- events ------------------------------------------------------------------------------------


def test_a_checkpoint_that_a_trainer_tells_of_is_looked_for_now(deployed: Project) -> None:
    before = len(runs("watch/trial"))
    deployed.cli("notify", "--uri", "/bucket/checkpoint-540")
    eventually(lambda: len(runs("watch/trial")) > before)
    before = len(runs("watch/trial"))
    state = SimpleNamespace(is_world_process_zero=True, global_step=600)
    NotifyCallback("trial").on_save(SimpleNamespace(output_dir="/bucket"), state, None)
    eventually(lambda: len(runs("watch/trial")) > before)


def test_a_server_that_is_down_stops_no_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    state = SimpleNamespace(is_world_process_zero=True, global_step=600)
    NotifyCallback("trial").on_save(SimpleNamespace(output_dir="/bucket"), state, None)
    assert "the service's schedule looks instead" in caplog.text


def test_only_the_main_process_of_a_training_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(urllib.request, "urlopen", never)
    state = SimpleNamespace(is_world_process_zero=False, global_step=600)
    NotifyCallback("trial").on_save(SimpleNamespace(output_dir="/bucket"), state, None)


def test_each_piece_of_news_reaches_a_person_as_one_message(
    deployed: Project, inbox: Inbox
) -> None:
    service = open_service(load_params(Path(deployed.params_file)))
    told = {f"trial: {subject}": f"what happened: {event}" for event, subject in NEWS.items()}
    for event in NEWS:
        tell(service, event, 480, f"what happened: {event}")

    def heard() -> list[dict[str, Any]]:  # other tests have trajectories of this name, with news
        return [m for m in inbox.messages if m["message"].startswith("what happened")]

    eventually(lambda: len(heard()) >= len(NEWS))
    assert {message["title"]: message["message"] for message in heard()} == told
    assert len(heard()) == len(NEWS)


def test_an_event_needs_nothing_but_pythons_library() -> None:
    program = (
        "import sys; import tasks.notify\n"
        "print(sorted({'torch', 'prefect', 'mlflow', 'pydantic'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [BINARIES / "python", "-c", program], capture_output=True, text=True, check=True,
        env={**os.environ},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_a_trajectory_may_be_named_where_there_is_no_params_file(
    prefect_server: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [BINARIES / "ckptfuse", "notify", "--trajectory", "elsewhere"], cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "was told of a checkpoint of elsewhere" in done.stderr


# -- by hand --------------------------------------------------------------------------------------


def test_the_file_alone_deploys_looks_every_minute_one_at_a_time(deployed: Project) -> None:
    """With Prefect's own command, on the pools that are there."""
    named = {
        "CKPTFUSE_TRAJECTORY": "by-hand",
        "CKPTFUSE_HOME": str(ROOT),
        "CKPTFUSE_PARAMS": "params.yaml",
    }
    command = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "infra/prefect.yaml"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **named}, check=True)
    with get_client(sync_client=True) as client:
        told = client.read_deployment_by_name("watch/by-hand")
    assert told.entrypoint == "flows.watch.watch"
    assert told.parameters == {"params_file": str(ROOT / "params.yaml")}
    (schedule,) = told.schedules
    assert schedule.active
    assert schedule.schedule.interval.total_seconds() == 60
    assert told.global_concurrency_limit is not None
    assert told.global_concurrency_limit.limit == 1
    assert told.concurrency_options is not None
    assert told.concurrency_options.collision_strategy == "CANCEL_NEW"
    # The flow as it is now accepts what the deployment gives it.
    assert told.parameters.keys() <= told.parameter_openapi_schema["properties"].keys()
