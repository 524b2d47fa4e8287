"""The whole stack of real servers, with a trainer, workers and ``execution: deployments``.

Minutes long, so with a marker of its own: ``make test-stack``.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.native.stack import Stack
from tests.conftest import BINARIES, DOMAINS, environment

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1500)]

#: Asked in a process of its own: this one speaks to the session's Prefect server.
SCORE_RUNS = """
import json
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
with get_client(sync_client=True) as client:
    runs = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["score"])))
    told = []
    for run in runs:
        logs = client.request("POST", "/logs/filter", json={
            "logs": {"flow_run_id": {"any_": [str(run.id)]}}}).json()
        told.append({"name": run.name, "state": run.state_name, "key": run.idempotency_key,
                     "worker": run.labels.get("prefect.worker.name"), "labels": run.labels,
                     "seconds": run.total_run_time.total_seconds(),
                     "logs": [line["message"] for line in logs]})
    print(json.dumps(told))
"""


class Running:
    """The stack, its parameters, and programs run in its environment."""

    def __init__(self, folder: Path, texts: Path) -> None:
        self.folder = folder
        params = {
            "trajectory": "stacked",
            "corpus": {
                "domains": {name: {"path": str(texts / f"{name}.jsonl")} for name in DOMAINS},
                "tokens": {"selection": 6_000, "audit": 16_000, "report": 6_000},
                "tokens_per_document": 1_024,
            },
            "scoring": {"block_length": 128, "threads": 1},
            "fuse": {"shards": 2},
            "watch": {"interval_seconds": 20, "settle_seconds": 3},
        }
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        self.stack = Stack(folder / "stack", folder / "params.yaml")

    @property
    def environment(self) -> Mapping[str, str]:
        return {**environment(), **self.stack.environment}

    def records(self, kind: str) -> list[dict[str, Any]]:
        folder = self.folder / "workspace" / "records" / kind
        return [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.json"))]

    def run(self, *command: str | Path) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def running(texts: Path) -> Iterator[Running]:
    """Where PostgreSQL's user can go, and no test's folder is."""
    folder = Path(tempfile.mkdtemp(prefix="ckptfuse-stack-"))
    folder.chmod(0o711)
    made = Running(folder, texts)
    try:
        made.stack.up()
        yield made
    finally:
        made.stack.down()
        shutil.rmtree(folder, ignore_errors=True)


def train(running: Running, texts: Path) -> subprocess.Popen[bytes]:
    """The demo's trainer, writing where S3 serves it from."""
    command = [
        sys.executable, "-m", "flows.demo.trainer", "--bucket", str(running.stack.bucket),
        "--texts", str(texts / "train.jsonl"), "--tokenizer", str(texts / "tokenizer"),
        "--hidden", "64", "--layers", "2", "--steps", "720", "--save-every", "60",
        "--warmup", "20",
    ]  # fmt: skip
    return subprocess.Popen(command, env=running.environment, stderr=subprocess.DEVNULL)


def test_a_trainer_is_watched_scored_by_two_workers_and_its_champion_is_served(
    running: Running, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = train(running, texts)
    deadline = time.monotonic() + 1200
    while not (trainer.poll() == 0 and is_done(running)):
        assert trainer.poll() in (None, 0)
        assert time.monotonic() < deadline, running.stack.describe()
        time.sleep(2)

    told = yaml.safe_load(running.run(sys.executable, "-c", SCORE_RUNS))
    workers = Counter(run["worker"] for run in told)
    with capsys.disabled():
        print()
        for run in sorted(told, key=lambda run: run["name"]):
            print(f"  {run['worker']}  {run['seconds']:5.1f} s  {run['state']}  {run['name']}")
        print(f"  shared: {dict(workers)}")
    assert len(workers) == 2, workers
    assert {run["state"] for run in told} == {"Completed"}
    assert all("scoring " in " ".join(run["logs"]) for run in told), "their logs are with the run"

    scored = Counter(record["model"] for record in running.records("score"))
    checkpoints = running.records("checkpoint")
    assert len(checkpoints) == 12
    assert all(scored[record["fingerprint"]] == 3 for record in checkpoints), "each split once"
    handed = [key for run in told for key in [run["key"]]]
    assert len(handed) == len(set(handed)) <= 12

    program = (
        "import mlflow; pipe = mlflow.transformers.load_model('models:/stacked@champion');"
        "print('GENERATED', pipe('import os', max_new_tokens=4)[0]['generated_text'])"
    )
    assert "GENERATED import os" in running.run(sys.executable, "-c", program)


def is_done(running: Running) -> bool:
    """All twelve are scored, and the newest's window is decided."""
    steps = {record["step"] for record in running.records("checkpoint")}
    published = {record["step"] for record in running.records("publication")}
    declined = {r["step"] for r in running.records("gate") if r["verdict"] == "declined"}
    return len(steps) == 12 and 720 in published | declined and bool(published)


def test_a_stack_that_was_stopped_goes_on_where_it_was(running: Running) -> None:
    before = running.records("publication")
    running.stack.down()
    for name in ("postgres", "prefect", "mlflow", "s3"):
        assert not running.stack.daemon(name).is_running()
    running.stack.up()
    told = running.run(BINARIES / "ckptfuse", "watch", "--once")
    assert "Nothing to do: 12 checkpoints" in told or "Another process" in told
    assert running.records("publication") == before
