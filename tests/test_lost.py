"""What a machine or a person lost, found by the doctor and brought back by the service."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from ckptfuse.digests import file_content
from ckptfuse.errors import PublicationError
from ckptfuse.overview import overview
from ckptfuse.params_loading import load_params
from ckptfuse.published import publications
from ckptfuse.records import FusionRecord
from ckptfuse.service import Service, open_service
from flows.watch import watch
from infra.native.postgres import free_port
from tasks import retention
from tasks.chain import verify
from tasks.checks.ledger import PUSHED, ledger
from tasks.checks.published import ALIAS, CHAMPION, TAGS, VERSIONS, published
from tasks.dvc_cache import DvcCache
from tasks.merged import bring_back, is_kept
from tasks.pipeline import weights_of
from tasks.prune import is_pruned, prune
from tasks.registry import registry_of
from tasks.version import ledger_of
from tests.conftest import Project, Trajectory, make_project
from tests.relocating import copy_of

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def project(finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """With two published fusions: of step 600, and of 720, the champion."""
    copied = copy_of(finished, tmp_path / "copy")
    monkeypatch.setenv("CKPTFUSE_BUCKET", str(copied.bucket))
    return copied


def opened(project: Project) -> Service:
    return open_service(load_params(Path(project.params_file)))


def seen(project: Project) -> dict[str, str]:
    return {c.name: c.state for c in published(opened(project), in_mlflow=True)}


def broken(project: Project, name: str) -> list[str]:
    return [link.name for link in verify(opened(project), name) if link.state == "broken"]


def publish_again(project: Project) -> None:
    """As docs/operations.md tells a person to.

    In a process of its own: MLflow keeps a database open.
    """
    shutil.rmtree(project.workspace / "records" / "publication")
    said = project.cli("watch", "--once").stdout
    assert said.strip() == "0 scored, 0 quarantined, 0 skipped, 2 published."


def test_versions_that_mlflow_lost_are_missed_and_registered_again(project: Project) -> None:
    before = publications(opened(project))
    for checkpoint in project.bucket.iterdir():  # the ledger's cache is enough
        shutil.rmtree(checkpoint)
    shutil.rmtree(project.workspace / "mlartifacts")
    (project.workspace / "mlflow.db").unlink()
    said = project.cli("doctor").stdout
    assert "ok       tags of the ledger: all 2 that the records name are there" in said
    assert f"warning  versions in MLflow: 2 of 2 are gone, last of them {before[0].tag}" in said
    assert not (project.workspace / "mlflow.db").exists(), "the doctor makes nothing"
    publish_again(project)
    assert seen(project) == {TAGS: "ok", VERSIONS: "ok", ALIAS: "ok", CHAMPION: "ok"}
    after = publications(opened(project))
    assert [record.fusion for record in after] == [record.fusion for record in before]
    assert project.aliases() == {"candidate": "2", "champion": "2"}
    assert [broken(project, name) for name in ("600", "720")] == [[], []]


def test_an_alias_that_a_restored_backup_brings_back_is_told_with_how_to_mend_it(
    project: Project,
) -> None:
    first, second = publications(opened(project))
    client = MlflowClient(project.mlflow_uri, project.mlflow_uri)
    client.set_registered_model_alias("trial", "champion", first.version)
    (told,) = (c for c in published(opened(project), in_mlflow=True) if c.name == ALIAS)
    assert told.state == "warning"
    assert told.said == (
        f"the alias champion points to {first.fusion[:12]}, and the champion by the records is "
        f"{second.fusion[:12]} of step 720; `ckptfuse promote {second.fusion[:12]}` moves it there"
    )
    assert [broken(project, name) for name in ("600", "720")] == [["alias -> records"]] * 2
    project.cli("promote", second.fusion[:12])
    assert seen(project)[ALIAS] == "ok"
    assert [broken(project, name) for name in ("600", "720")] == [[], []]


def test_a_ledger_that_was_lost_is_missed_and_written_again(project: Project) -> None:
    shutil.rmtree(project.workspace / "ledger")
    assert seen(project) == {TAGS: "warning", VERSIONS: "ok", ALIAS: "ok", CHAMPION: "ok"}
    through_it = {"tag -> commit", "commit -> its files", "commit -> dvc.lock"}
    assert through_it < {x.name for x in verify(opened(project), "720") if x.state == "gone"}
    assert broken(project, "720") == []
    versions = project.versions()
    publish_again(project)
    assert seen(project) == {TAGS: "ok", VERSIONS: "ok", ALIAS: "ok", CHAMPION: "ok"}
    assert project.versions() == versions, "none was registered twice"
    assert [broken(project, name) for name in ("600", "720")] == [[], []]


@pytest.mark.parametrize("begun_anew", [False, True])
def test_retention_goes_on_without_the_ledger_that_was_lost(
    project: Project, begun_anew: bool
) -> None:
    """As if the fusion of step 600 had never been champion: nothing but the policy holds it."""
    for path in (project.workspace / "records" / "promotion").glob("*.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "promoted": values["step"] != 600}))
    shutil.rmtree(project.workspace / "ledger")
    if begun_anew:
        ledger_of(opened(project)).prepare(None)
    params = Path(project.params_file)
    policy = {"retention": {"last": 1}}
    params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), **policy}))
    assert not is_pruned(opened(project))
    prune.fn(opened(project))
    assert [version for version, _ in project.versions()] == ["2"]
    assert is_pruned(opened(project))
    assert {x.state for x in verify(opened(project), "720")} == {"holds", "gone"}


def test_what_stands_in_the_way_of_retention_is_run_into_once_an_hour(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = Path(project.params_file)
    slip: dict[str, dict[str, object]] = {"retention": {"last": 1, "keep": ["1700"]}}
    params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), **slip}))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    assert not is_pruned(opened(project))
    prune.fn(opened(project))
    assert is_pruned(opened(project))
    now += 3600
    assert not is_pruned(opened(project))
    prune.fn(opened(project))
    assert is_pruned(opened(project))
    slip["retention"]["keep"] = []
    params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), **slip}))
    assert not is_pruned(opened(project)), "what was in the way is not there any more"


def test_a_fault_of_ours_does_not_pass_for_mlflows(project: Project) -> None:
    service = opened(project)
    with pytest.raises(PublicationError, match="MLflow: Mlflow"), registry_of(service) as registry:
        registry.client.get_run("none")
    with pytest.raises(PublicationError, match="directory: 'none'"), registry_of(service):
        Path("none").read_bytes()
    with pytest.raises(KeyError), registry_of(service):
        raise KeyError("none")


def test_tags_that_a_git_remote_has_not_got_yet_are_told(project: Project, tmp_path: Path) -> None:
    remote = tmp_path / "remote.git"
    subprocess.run(["git", "init", "--quiet", "--bare", remote], check=True)
    params = Path(project.params_file)
    later = {"ledger": {"remote": str(remote)}}
    params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), **later}))
    (told,) = (check for check in ledger(opened(project)) if check.name == PUSHED)
    assert told.state == "warning"
    assert told.said.startswith("2 of 2 are not there, last of them step-720-")
    project.git("push", "--quiet", "--tags", str(remote), "main")
    (told,) = (check for check in ledger(opened(project)) if check.name == PUSHED)
    assert told.state == "ok"


def test_what_does_not_answer_is_unchecked_and_not_broken(project: Project, tmp_path: Path) -> None:
    away = {
        "CKPTFUSE_BUCKET": "s3://bucket/run",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_MAX_ATTEMPTS": "1",
    }
    said = project.cli("verify", status=1, **away)
    states = {line.split()[0] for line in said.stdout.splitlines() if " input " in line}
    assert states == {"unchecked"}
    assert "broken" not in said.stdout + said.stderr
    assert "ckptfuse: out of reach, so unproved, is input checkpoint-" in said.stderr
    told = json.loads(project.cli("verify", "--json", status=1, **away).stdout)
    assert not told["holds"]


def test_a_version_that_lost_its_weights_gets_them_again(project: Project) -> None:
    for weights in (project.workspace / "mlartifacts").rglob("*.safetensors"):
        weights.unlink()
    said = project.cli("doctor", status=1).stdout
    assert "failed   files of the champion: version 2 (step-720-" in said
    assert "model.safetensors is not there at its" in said
    publish_again(project)
    assert seen(project) == {TAGS: "ok", VERSIONS: "ok", ALIAS: "ok", CHAMPION: "ok"}
    assert [broken(project, name) for name in ("600", "720")] == [[], []]


def test_a_version_whose_logged_model_was_deleted_would_not_load_and_is_replaced(
    project: Project,
) -> None:
    client = MlflowClient(project.mlflow_uri, project.mlflow_uri)
    source = str(client.get_model_version("trial", "2").source)
    client.delete_logged_model(source.removeprefix("models:/"))
    said = project.cli("doctor", status=1).stdout
    assert "failed   files of the champion: version 2 (step-720-" in said
    assert "would not load: its logged model was deleted in MLflow" in said
    assert broken(project, "720") == ["version -> fusion.json"]
    publish_again(project)
    assert seen(project) == {TAGS: "ok", VERSIONS: "ok", ALIAS: "ok", CHAMPION: "ok"}
    assert project.aliases() == {"candidate": "3", "champion": "3"}
    assert [broken(project, name) for name in ("600", "720")] == [[], []]


def test_weights_come_back_from_the_ledger_or_else_the_registry_or_not_at_all(
    project: Project,
) -> None:
    service = opened(project)
    first, _ = publications(service)
    copy = service.workspace.model(first.fusion)
    objects = DvcCache(ledger_of(service)).objects(
        *weights_of(ledger_of(service).outputs(first.tag))
    )
    (packaged,) = (
        path
        for path in (project.workspace / "mlartifacts").rglob("model.safetensors")
        if path.samefile(DvcCache(ledger_of(service)).model(first.tag)[path.name])
    )

    def comes_back() -> bool:
        shutil.rmtree(copy, ignore_errors=True)
        bring_back(service, first.fusion, first.tag)
        return copy.is_dir()

    assert comes_back()
    weights = DvcCache(ledger_of(service)).model(first.tag)["model.safetensors"]
    assert weights.samefile(copy / "model.safetensors"), "a link: no more disk"
    for path in objects:
        path.unlink()
    assert comes_back()
    made = {path.name: file_content(path) for path in copy.iterdir()}
    merged = service.records.get(FusionRecord, first.fusion)
    assert merged is not None
    assert made == merged.files
    data = packaged.read_bytes()
    packaged.unlink()
    packaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not comes_back(), "other bytes"


def test_the_last_copy_of_a_published_fusion_is_not_deleted(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    service = opened(project)
    first, second = publications(service)
    bring_back(service, first.fusion, first.tag)
    kept = DvcCache(ledger_of(service)).model(first.tag)["model.safetensors"]
    aside = kept.rename(kept.with_suffix(".aside"))
    away = (project.workspace / "mlartifacts").rename(project.workspace / "away")
    assert not retention.copies_are_pruned(service)
    assert list(retention.prune_copies(service)) == []
    assert retention.copies_are_pruned(service), "it is looked for once"
    assert f"the workspace's copy of {first.tag} stays" in caplog.text
    assert {path.name for path in (project.workspace / "models").iterdir()} == {
        first.fusion, second.fusion,
    }  # fmt: skip
    aside.rename(kept)
    (gone,) = retention.prune_copies(service)
    assert gone.reason == "published, and kept elsewhere"
    away.rename(project.workspace / "mlartifacts")
    bring_back(service, first.fusion, first.tag)
    kept.rename(aside)
    assert is_kept(service, first.model_copy(update={"version": "99"})), "of another server"
    MlflowClient(project.mlflow_uri, project.mlflow_uri).delete_model_version("trial", "1")
    assert not is_kept(service, first)


def test_a_champion_that_is_not_published_yet_fails_its_check_and_no_more(
    project: Project,
) -> None:
    _, second = publications(opened(project))
    (project.workspace / "records" / "publication" / f"{second.window}.json").unlink()
    assert seen(project) == {TAGS: "ok", VERSIONS: "ok", ALIAS: "ok", CHAMPION: "failed"}


def test_a_bucket_may_move_and_a_gate_may_change_and_the_chain_holds(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = project.bucket.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("CKPTFUSE_BUCKET", str(elsewhere))
    versions, tags = project.versions(), project.git("tag")
    params = Path(project.params_file)
    gate = {"gate": {"minimum_gain": 0.001}}
    params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), **gate}))
    done = watch(project.params_file)
    assert ([v.step for v in done.verdicts], done.published, done.delayed) == ([720], 1, None)
    assert (project.versions(), project.git("tag")) == (versions, tags), "the same fusion"
    assert [broken(project, name) for name in ("600", "720")] == [[], []]
    words = {row.step: row.verdict for row in overview(opened(project)).rows}
    assert (words[600], words[720]) == ("published", "champion")


def test_while_mlflow_is_down_later_windows_are_merged_and_judged_all_the_same(
    tmp_path: Path, trajectory: Trajectory
) -> None:
    nowhere = {"tracking_uri": f"http://127.0.0.1:{free_port()}"}
    project = make_project(tmp_path / "down", trajectory, mlflow=nowhere)
    project.land(420, 480, 540, 600)
    first = watch(project.params_file)
    project.land(660, 720)
    second = watch(project.params_file)
    for look, count in ((first, 1), (second, 2)):
        assert (look.published, len(look.waiting)) == (0, count)
        assert "does not answer" in str(look.delayed)
    assert sorted(str(g["step"]) for g in project.records("gate").values()) == ["600", "720"]
    assert len(project.git("tag").split()) == 2, "the ledger does not wait either"

    params = Path(project.params_file)
    params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), "mlflow": {}}))
    third = watch(project.params_file)
    assert (third.published, third.delayed) == (2, None)
    assert [record.step for record in publications(opened(project))] == [600, 720]
    assert project.aliases()["candidate"] == "2"


def test_a_new_workspace_goes_on_with_the_ledger_and_the_registry_of_a_lost_one(
    project: Project, tmp_path: Path
) -> None:
    remote = tmp_path / "remote.git"
    subprocess.run(["git", "init", "--quiet", "--bare", remote], check=True)
    project.git("push", "--quiet", "--follow-tags", str(remote), "main")
    history, versions, aliases = project.git("log", "--all"), project.versions(), project.aliases()
    params = Path(project.params_file)
    ledger = {"ledger": {"remote": str(remote)}}
    params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), **ledger}))
    for path in project.workspace.iterdir():
        if path.is_dir() and path.name != "mlartifacts":  # the registry is elsewhere
            shutil.rmtree(path)

    done = watch(project.params_file)
    assert (done.scored, done.published, done.delayed) == (6, 1, None)
    assert project.git("log", "--all") == history, "the same fusion: nothing new to commit"
    assert (project.versions(), project.aliases()) == (versions, aliases)
    assert watch(project.params_file).did_nothing
    # The first decision stands in run and commit; the new workspace's gate counts its tests anew.
    assert broken(project, "720") == ["run -> records", "commit -> records"]
    (newest,) = publications(opened(project))
    # The other tag's data went with the old workspace, and stops no deletion.
    assert DvcCache(ledger_of(opened(project))).only_of(newest.tag, [newest.tag])
