"""What is kept beside the registered model: hashes of the weights in DVC, checkpoints in copies.

One project that publishes with ``versions: {weights: manifest, inputs: held}``.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.errors import ChangedCheckpoint, MissingFile
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.params_loading import load_params
from ckptfuse.published import find_publication
from ckptfuse.records import GateRecord, PlanRecord, PublicationRecord
from ckptfuse.service import Service, open_service, plans_of
from flows.cli import app
from flows.fuse import publish_window
from flows.watch import watch
from tasks import held, stages
from tasks.chain import Link, verify
from tasks.dvc_cache import DvcCache
from tasks.version import ledger_of
from tests.conftest import Project, environment
from tests.relocating import copy_of

pytestmark = pytest.mark.usefixtures("prefect_server")

VERSIONS = {"weights": "manifest", "inputs": "held"}


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished project, whose last fusion is published anew; with a bucket of its own."""
    project = copy_of(finished, tmp_path_factory.mktemp("kept") / "copy")
    for kind in ("publication", "promotion"):
        for path in (project.workspace / "records" / kind).glob("*.json"):
            if yaml.safe_load(path.read_text())["step"] == 720:
                path.unlink()
    for folder in ("ledger", "mlartifacts"):
        shutil.rmtree(project.workspace / folder)
    (project.workspace / "mlflow.db").unlink()
    params = Path(project.params_file)
    params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), "versions": VERSIONS}))
    done = watch(project.params_file)
    assert (done.published, done.delayed, done.verdicts) == (1, None, [])
    return project


@pytest.fixture(autouse=True)
def bucket(project: Project, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPTFUSE_BUCKET", str(project.bucket))
    return project.bucket


def opened(project: Project) -> Service:
    return open_service(load_params(Path(project.params_file)))


def published(project: Project) -> PublicationRecord:
    return find_publication(opened(project), "720")


def plan(project: Project) -> PlanRecord:
    return plans_of(opened(project))[published(project).window]


def links(project: Project) -> dict[str, Link]:
    return {link.name: link for link in verify(opened(project), "720")}


@pytest.fixture
def moved(bucket: Path) -> Iterator[str]:
    """The name of a checkpoint that is not in the bucket for a while."""
    away = (bucket / "checkpoint-720").rename(bucket.parent / "away")
    yield "checkpoint-720"
    shutil.rmtree(bucket / "checkpoint-720", ignore_errors=True)
    away.rename(bucket / "checkpoint-720")


def test_dvc_holds_the_hashes_of_the_weights_and_the_chain_holds_all_the_same(
    project: Project,
) -> None:
    ledger = project.workspace / "ledger"
    (weights,) = (project.workspace / "mlartifacts").rglob("*.safetensors")
    held_by_dvc = [p for p in (ledger / ".dvc" / "cache").rglob("*") if p.is_file()]
    assert weights.stat().st_size not in {path.stat().st_size for path in held_by_dvc}
    manifest = json.loads((ledger / "manifest.json").read_text())
    assert manifest["files"][weights.name]["size"] == weights.stat().st_size
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status"],
        cwd=ledger, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "up to date" in status.stdout
    assert {link.state for link in links(project).values()} == {"holds"}
    tag = published(project).tag
    own = DvcCache(ledger_of(opened(project))).only_of(tag, [tag])
    assert [path.read_bytes() for path in own] == [(ledger / "manifest.json").read_bytes()]


def test_a_changed_byte_in_weights_whose_hashes_alone_dvc_holds_is_found(project: Project) -> None:
    (weights,) = (project.workspace / "mlartifacts").rglob("*.safetensors")
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    broken = {link.name for link in links(project).values() if link.state == "broken"}
    weights.write_bytes(data)
    assert broken == {"version -> fusion.json", "DVC cache -> fusion.json"}


def test_a_held_checkpoint_stands_in_for_one_that_its_trainer_deleted_or_overwrote(
    project: Project, bucket: Path, moved: str
) -> None:
    deleted = links(project)[f"input {moved}"]
    assert deleted.state == "holds"
    assert "is not there any more; the copy that is held has fingerprint" in deleted.said
    shutil.copytree(bucket / "checkpoint-660", bucket / moved)
    overwritten = links(project)[f"input {moved}"]
    assert overwritten.state == "holds"
    assert "it was written again since; the copy that is held" in overwritten.said


def test_a_stage_names_the_checkpoint_that_is_gone_or_overwritten(
    project: Project, bucket: Path, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.workspace / "ledger")
    with pytest.raises(MissingFile, match=r"step 720 is not at .*`dvc pull` fetches"):
        stages.score("step720")
    shutil.copytree(bucket / "checkpoint-660", bucket / moved)
    with pytest.raises(ChangedCheckpoint, match=r"step 720 at .* was written again since"):
        stages.fuse()


def test_the_same_bytes_are_made_from_the_held_checkpoints_alone(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("params.yaml", "window.yaml", "decision.json"):
        shutil.copyfile(project.workspace / "ledger" / name, tmp_path / name)
    window = project.workspace / "held" / published(project).tag
    monkeypatch.setenv("CKPTFUSE_BUCKET", str(window))
    monkeypatch.chdir(tmp_path)
    stages.fuse()
    (weights,) = (project.workspace / "mlartifacts").rglob("*.safetensors")
    assert (tmp_path / "model" / weights.name).read_bytes() == weights.read_bytes()


@pytest.mark.parametrize("state", ["deleted", "half deleted", "written over"])
def test_a_fusion_is_published_again_from_the_held_checkpoints(
    project: Project, bucket: Path, moved: str, state: str
) -> None:
    before = published(project)
    if state != "deleted":
        shutil.copytree(bucket / "checkpoint-660", bucket / moved)
    if state == "half deleted":
        (bucket / moved / "model.safetensors").unlink()
    assert links(project)[f"input {moved}"].state == "holds"
    shutil.rmtree(project.workspace / "models")
    (weights,) = (project.workspace / "mlartifacts").rglob("*.safetensors")
    made = weights.read_bytes()
    weights.unlink()
    shutil.rmtree(project.workspace / "records" / "publication")
    verdict = next(g for g in opened(project).records.all(GateRecord).values() if g.step == 720)
    publish_window(opened(project), plans_of(opened(project))[verdict.window], verdict)
    assert published(project) == before
    (weights,) = (project.workspace / "mlartifacts").rglob("*.safetensors")
    assert weights.read_bytes() == made
    assert links(project)["version -> fusion.json"].state == "holds"


def test_what_holding_costs_is_told_and_let_go_with_the_fusion(project: Project) -> None:
    service, tag, decided = opened(project), published(project).tag, plan(project)
    cost = held.cost(service)
    kept = [service.workspace.held(member.fingerprint) for member in decided.members]
    assert cost.checkpoints == len(kept) > 3
    for member, folder in zip(decided.members, kept, strict=True):
        assert fingerprint_of(open_checkpoint(str(folder))) == member.fingerprint
        assert folder is not None
        assert not any(path.name.startswith("optimizer") for path in folder.iterdir())
    told = CliRunner().invoke(app, ["prune", "--dry-run", "--params", project.params_file]).stdout
    assert f"held   {cost.checkpoints} checkpoints that fusions were made of, " in told
    assert f"{cost.bytes / 1e6:.1f} MB\n" in told

    held.hold(service, decided, "another")  # of the same checkpoints: nothing is copied twice
    assert held.cost(service) == cost
    assert held.only_of(service, tag, ()) == set()
    assert len(held.only_of(service, tag, ["another"])) > 2 * len(kept)
    held.release(service, "another")
    assert held.cost(service) == cost
    first, *others = decided.members
    gone = first.model_copy(update={"name": "nowhere"})
    held.release(service, tag)
    assert held.cost(service) == held.Cost(0, 0)
    held.hold(service, decided.model_copy(update={"members": [gone, *others]}), tag)
    assert held.cost(service).checkpoints == len(others), "the others are held all the same"
    held.hold(service, decided, tag)
    assert held.cost(service) == cost
