"""What must not be published, or not be used at all: each is told, and the rest goes on."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ckptfuse.checkpoints import Checkpoint
from ckptfuse.errors import StoreError
from ckptfuse.layouts import Layout, read_layout
from ckptfuse.params_loading import load_params
from ckptfuse.service import Service, open_service
from ckptfuse.steps.look import discover, look_file, next_actions
from flows.cli import app
from flows.watch import watch
from tasks.score import score_checkpoints
from tests.conftest import Project, Trajectories, Trajectory, make_project
from tests.helpers import write_checkpoint
from tests.observing import runs_in_prefect

pytestmark = pytest.mark.usefixtures("prefect_server")

Tensors = dict[str, torch.Tensor]


def service_of(project: Project) -> Service:
    return open_service(load_params(Path(project.params_file)))


def reasons(project: Project) -> dict[str, str]:
    """Name -> reason, of all that is quarantined."""
    return {str(r["name"]): str(r["reason"]) for r in project.records("quarantine").values()}


def change_weights(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Rewrite a checkpoint's weights as its trainer would have, its state file last."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "trainer_state.json").touch()


@pytest.fixture(scope="module")
def troubled(
    prefect_server: str, trajectory: Trajectory, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    """Three healthy checkpoints and one of each trouble; the service has looked once."""
    project = make_project(tmp_path_factory.mktemp("troubled"), trajectory)
    project.land(420, 480, 540, 600, 660, 720)

    def put_nan(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")

    change_weights(project.bucket / "checkpoint-600", put_nan)
    with (project.bucket / "checkpoint-660" / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 8)
    (project.bucket / "checkpoint-660" / "trainer_state.json").touch()
    weights = project.bucket / "checkpoint-720" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (project.bucket / "checkpoint-720" / "trainer_state.json").touch()
    write_checkpoint(project.bucket / "checkpoint-700", {"other.weight": torch.ones(8, 8)})
    summary = watch(project.params_file)
    assert (summary.scored, summary.incomplete) == (3, 1), summary
    return project


def test_prefect_shows_what_a_look_found_and_did(troubled: Project) -> None:
    """Its name tells of it in a list of hundreds; the table of fusions is an artifact."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    runs = runs_in_prefect(troubled)
    look = next(run for run in runs if run.name.startswith("watch"))
    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[look.id]))
    with get_client(sync_client=True) as client:
        tables = client.read_artifacts(artifact_filter=chosen)
    assert look.name == "watch to step 700: 3 scored, 1 published, 3 quarantined"
    assert "fuse step 540" in {run.name for run in runs}
    told = [str(table.data) for table in tables if table.key == "fusions-trial"]
    (verdict,) = troubled.records("gate").values()
    assert len(told) == 1
    assert "| 540 | " in told[0]
    assert str(verdict["reason"]) in told[0]


def test_nan_weights_are_quarantined_by_the_name_of_their_tensor(troubled: Project) -> None:
    assert (
        "'model.layers.1.mlp.up_proj.weight' has 1 NaN or Inf"
        in reasons(troubled)["checkpoint-600"]
    )


def test_a_damaged_header_is_quarantined(troubled: Project) -> None:
    assert "claims a header of" in reasons(troubled)["checkpoint-660"]


def test_another_architecture_in_the_bucket_is_quarantined(troubled: Project) -> None:
    assert "another model in the same bucket" in reasons(troubled)["checkpoint-700"]


def test_nothing_else_is_quarantined_and_the_healthy_ones_are_fused(troubled: Project) -> None:
    assert sorted(reasons(troubled)) == ["checkpoint-600", "checkpoint-660", "checkpoint-700"]
    (decided,) = troubled.plans()
    assert [member["step"] for member in decided["members"]] == [420, 480, 540]


def test_trouble_is_told_by_status_and_report(troubled: Project) -> None:
    shown = troubled.cli("status").stdout
    assert "quarantined checkpoint-600: " in shown
    assert "checkpoint-720 is not complete yet: " in shown
    page = Path(troubled.cli("report").stdout.strip()).read_text()
    assert "another model in the same bucket" in page


def test_a_trainer_that_cleans_up_causes_no_work(troubled: Project, tmp_path: Path) -> None:
    """Optimizer state deleted, then the oldest checkpoint, as `save_total_limit` does."""
    service = service_of(troubled)
    bucket = shutil.copytree(troubled.bucket, tmp_path / "kept", copy_function=shutil.copy2)
    (troubled.bucket / "checkpoint-480" / "optimizer.pt").unlink()
    shutil.rmtree(troubled.bucket / "checkpoint-420")
    try:
        assert not next_actions(service, *discover(service), live=True)
    finally:
        shutil.rmtree(troubled.bucket)
        shutil.copytree(bucket, troubled.bucket, copy_function=shutil.copy2)


def test_a_half_written_checkpoint_counts_once_it_is_whole(troubled: Project) -> None:
    """And a step written again with other bytes opens a new generation."""
    source = troubled.trajectory.bucket / "checkpoint-720"
    shutil.copy2(source / "model.safetensors", troubled.bucket / "checkpoint-720")
    (troubled.bucket / "checkpoint-720" / "trainer_state.json").touch()
    summary = watch(troubled.params_file)
    assert (summary.scored, summary.incomplete) == (1, 0)
    newest = max(troubled.plans(), key=lambda plan: int(str(plan["step"])))
    assert [member["step"] for member in newest["members"]] == [420, 480, 540, 720]


def test_a_step_that_is_written_again_opens_a_new_generation(
    troubled: Project, trajectories: Trajectories
) -> None:
    """The run was rolled back to 480 and trained on to other weights at 540."""
    folder = troubled.bucket / "checkpoint-540"
    shutil.rmtree(folder)
    shutil.copytree(trajectories.decayed.bucket / "checkpoint-540", folder)
    now = time.time() + 1
    for path in folder.iterdir():
        os.utime(path, (now, now))
    summary = watch(troubled.params_file)
    assert summary.scored == 1
    again = [r for r in troubled.records("checkpoint").values() if r["step"] == 540]
    assert sorted(int(str(r["generation"])) for r in again) == [1, 2]
    (newest,) = [p for p in troubled.plans() if p["ancillary"] == max(
        again, key=lambda r: int(str(r["generation"]))
    )["fingerprint"]]  # fmt: skip
    assert [member["step"] for member in newest["members"]] == [420, 480, 540]


def test_a_run_that_decayed_to_its_end_is_declined(
    trajectories: Trajectories, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "decayed", trajectories.decayed)
    project.land(*trajectories.decayed.steps())
    summary = watch(project.params_file)
    (verdict,) = summary.verdicts
    assert verdict.verdict == "declined"
    reasons = ("no gain expected", "averaging gains nothing here", "no proven gain")
    assert any(reason in verdict.reason for reason in reasons)
    assert project.records("publication") == {}
    assert not (project.workspace / "models").exists() or not any(
        (project.workspace / "models").iterdir()
    )
    told = project.cli("fuse", "--step", "720", status=3)
    assert told.stdout.startswith("step 720: declined: ")
    shown = project.cli("status", COLUMNS="400").stdout
    assert f"step 720 was declined: {verdict.reason}" in shown


def deny(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the store refuse to hand out these checkpoints."""

    def read(checkpoint: Checkpoint) -> Layout:
        if checkpoint.name in names:
            raise StoreError(f"{checkpoint.name}: access denied")
        return read_layout(checkpoint)

    monkeypatch.setattr("ckptfuse.listing.read_layout", read)


def test_checkpoints_that_the_store_denies_are_told_and_fail_the_look(
    trajectory: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not taken for such as their trainer still writes."""
    project = make_project(tmp_path / "denied", trajectory)
    project.land(420, 480)

    deny(monkeypatch, "checkpoint-420", "checkpoint-480")
    done = CliRunner().invoke(app, ["watch", "--once", "--params", project.params_file])
    assert done.exit_code == 1
    assert "2 could not be read or scored, checkpoint-480 among them" in done.output
    assert "checkpoint-420 could not be read now: checkpoint-420: access denied" in done.output
    last = look_file(service_of(project)).last()
    assert last is not None
    assert ([item.name for item in last.held], last.incomplete) == (
        ["checkpoint-420", "checkpoint-480"], (),
    )  # fmt: skip


@pytest.mark.usefixtures("prefect_server")
def test_a_checkpoint_that_is_denied_fails_a_look_that_scored_another(
    trajectory: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path / "denied", trajectory)
    project.land(420, 480)
    deny(monkeypatch, "checkpoint-480")
    done = CliRunner().invoke(app, ["watch", "--once", "--params", project.params_file])
    assert done.exit_code == 1
    assert "1 scored" in done.output
    assert "1 could not be read or scored, checkpoint-480 among them" in done.output


def test_parameters_that_are_edited_during_a_look_decide_from_the_next_on(
    trajectory: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path / "edited", trajectory)
    project.land(600, 660, 720)
    scoring = score_checkpoints

    def edited_meanwhile(*arguments: Any) -> object:
        unscored = scoring(*arguments)
        file = Path(project.params_file)
        values = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump({**values, "rule": {"name": "uniform"}}))
        return unscored

    monkeypatch.setattr("flows.watch.score_checkpoints", edited_meanwhile)
    first = watch(project.params_file)
    assert (first.scored, first.verdicts, project.plans()) == (3, [], [])
    assert len(watch(project.params_file).verdicts) == 1
    assert [plan["rule"] for plan in project.plans()] == ["uniform"]


def test_a_newest_checkpoint_that_went_bad_is_fused_around(
    trajectory: Trajectory, tmp_path: Path
) -> None:
    """Finite, but worse by far, as after a spike: it gets no weight, and the merge no harm."""
    project = make_project(tmp_path / "bad", trajectory)
    project.land(540, 600, 660, 720)

    def spoil(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        for values in tensors.values():
            values += 0.4 * values.std() * torch.randn(values.shape, generator=generator)

    change_weights(project.bucket / "checkpoint-720", spoil)
    (verdict,) = watch(project.params_file).verdicts
    (decided,) = project.plans()
    weights = {member["step"]: member["weight"] for member in decided["members"]}
    assert weights[720] == 0
    assert sum(weight > 0 for weight in weights.values()) > 1
    assert verdict.verdict == "publish", verdict.reason
    assert "the best single one (step 660)" in verdict.reason
    gains = {comparison.against: comparison.gain for comparison in verdict.comparisons}
    assert gains["newest"] > gains["best"] > 0
