"""What a service has left behind, in a form that two runs can be compared by."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from tasks.artifacts import local_folder
from tests.conftest import Project


def observe(project: Project) -> dict[str, Any]:
    """All that the service leaves behind, less what holds the time of day or a random name."""
    return {
        **dict(_records(project.workspace / "records")),
        **{f"models/{name}": found for name, found in _hashes(project.workspace / "models")},
        "left over": sorted(path.name for path in (project.workspace / "tmp").iterdir()),
        "tags": {tag: project.git("rev-parse", f"{tag}^{{tree}}") for tag in _tags(project)},
        "commits": project.git("log", "--format=%s", "main").splitlines(),
        "uncommitted": project.git("status", "--porcelain"),
        "versions": project.versions(),
        "aliases": project.aliases(),
        **_mlflow(project),
    }


def _records(folder: Path) -> Iterator[tuple[str, object]]:
    for name, content in _hashes(folder):
        if name.endswith(".json"):
            values = json.loads((folder / name).read_text())
            yield name, {key: value for key, value in values.items() if key != "commit"}
        else:
            yield name, content


def _hashes(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            yield str(path.relative_to(folder)), content


def _tags(project: Project) -> list[str]:
    return project.git("tag").split()


def runs_in_prefect(project: Project) -> list[FlowRun]:
    """Those that were given the project's parameters, the newest first."""
    with get_client(sync_client=True) as client:
        return [
            run
            for run in client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC)
            if run.parameters.get("params_file") == project.params_file
        ]


def _mlflow(project: Project) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=project.mlflow_uri, registry_uri=project.mlflow_uri)
    experiment = client.get_experiment_by_name("trial")
    assert experiment is not None
    found: dict[str, Any] = {}
    for model in client.search_logged_models([experiment.experiment_id]):
        name = f"model {model.tags['ckptfuse.fusion']}"
        assert name not in found, "two logged models of one fusion"
        folder = local_folder(model.artifact_location)
        assert folder is not None
        found[name] = str(model.status)
        for file, content in _hashes(folder):
            found[f"{name} {file}"] = "" if file == "MLmodel" else content  # it holds a time
    for run in client.search_runs([experiment.experiment_id]):
        name = f"run {run.info.run_name}"
        assert name not in found, "two runs of one name"
        found[name] = run.info.status
        found[f"{name} corpus"] = sorted(
            f"{item.dataset.name} {item.dataset.digest}" for item in run.inputs.dataset_inputs
        )
        for metric in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, metric)
            found[f"{name} {metric}"] = sorted((point.step, point.value) for point in history)
    return found
