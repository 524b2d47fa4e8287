"""What people do with published fusions: move the champion, prove a version, let old ones go.

All on copies of one finished project (tests/relocating.py), in this process.
"""

import json
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner, Result

from ckptfuse.params_loading import load_params
from ckptfuse.promotion import champion, promote_by_hand, rollback_by_hand
from ckptfuse.published import find_publication, publications
from ckptfuse.records import PromotionRecord, PublicationRecord, RetirementRecord
from ckptfuse.service import Service, open_service
from flows.cli import app
from tasks.aliases import settle_champion
from tasks.artifacts import local_folder
from tasks.chain import verify
from tasks.curves import draw_curves
from tasks.registry import registry_of
from tests.conftest import Project
from tests.relocating import copy_of

BY_HAND = {"by": "someone@somewhere", "reason": "because"}


@pytest.fixture
def project(finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of this test's own, with two published fusions: of step 600, and of 720."""
    copied = copy_of(finished, tmp_path / "copy")
    monkeypatch.setenv("CKPTFUSE_BUCKET", str(copied.bucket))
    return copied


@pytest.fixture(scope="module")
def lasting(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """One for tests that put right what they damage."""
    copied = copy_of(finished, tmp_path_factory.mktemp("lasting") / "copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPTFUSE_BUCKET", str(copied.bucket))
        yield copied


def opened(project: Project) -> Service:
    return open_service(load_params(Path(project.params_file)))


def run(project: Project, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--params", project.params_file])


def of_step(project: Project, step: int) -> PublicationRecord:
    return find_publication(opened(project), str(step))


def artifacts(project: Project, step: int) -> Path:
    """The folder of the packaged model in the artifact store."""
    client = MlflowClient(tracking_uri=project.mlflow_uri, registry_uri=project.mlflow_uri)
    version = client.get_model_version("trial", of_step(project, step).version)
    model = client.get_logged_model(str(version.source).removeprefix("models:/"))
    folder = local_folder(str(model.artifact_location))
    assert folder is not None
    return folder


# -- the chain -----------------------------------------------------------------------------------


def broken(project: Project, step: int) -> set[str]:
    return {link.name for link in verify(opened(project), str(step)) if link.state == "broken"}


@contextmanager
def rewritten(path: Path, old: bytes, new: bytes) -> Iterator[None]:
    """A file, in a place of its own, in which the first ``old`` is ``new`` for a while."""
    data = path.read_bytes()
    assert old in data
    path.unlink()
    path.write_bytes(data.replace(old, new, 1))
    try:
        yield
    finally:
        path.write_bytes(data)


def test_the_chain_of_each_version_holds_down_to_its_checkpoints(lasting: Project) -> None:
    links = list(verify(opened(lasting), "720"))
    assert {link.state for link in links} == {"holds"}
    window = next(p for p in lasting.records("plan").values() if p["step"] == 720)
    used = [m["name"] for m in window["members"] if m["weight"]]  # type: ignore[attr-defined]
    inputs = [link.name.removeprefix("input ") for link in links if link.name.startswith("input")]
    assert set(used) <= set(inputs)
    assert broken(lasting, 600) == set()


def test_verify_prints_each_link_and_names_the_one_that_is_broken(lasting: Project) -> None:
    done = run(lasting, "verify")  # the champion's
    assert (done.exit_code, done.stdout.count("holds ")) == (0, len(done.stdout.splitlines()))
    with rewritten(artifacts(lasting, 600) / "model" / "config.json", b'"', b"'"):
        done = run(lasting, "verify", "v1")
        answer = json.loads(run(lasting, "verify", "v1", "--json").stdout)
    assert done.exit_code == 1
    assert "the chain is broken at version -> fusion.json" in done.stderr
    assert "the bytes of config.json differ" in done.stderr
    assert not answer["holds"]
    assert [x["name"] for x in answer["links"] if x["state"] == "broken"] == [
        "version -> fusion.json"
    ]


def test_a_changed_byte_in_the_registered_weights_is_found(lasting: Project) -> None:
    weights = artifacts(lasting, 720) / "model" / "model.safetensors"
    last = weights.read_bytes()[-8:]
    with rewritten(weights, last, bytes(b ^ 1 for b in last)):
        assert broken(lasting, 720) == {"version -> fusion.json"}


def test_a_changed_byte_in_the_dvc_cache_is_found(lasting: Project) -> None:
    (listed,) = lasting.workspace.joinpath("ledger/.dvc/cache").rglob(
        of_step(lasting, 720).weights_hash[2:]
    )
    (md5,) = (f["md5"] for f in json.loads(listed.read_text()) if f["relpath"] == "README.md")
    with rewritten(listed.parent.parent / md5[:2] / md5[2:], b"# Fusion", b"# fusion"):
        found = broken(lasting, 720)
    assert found == {"dvc.lock -> DVC cache", "DVC cache -> fusion.json"}


def test_a_moved_tag_is_found(lasting: Project) -> None:
    tag, commit = of_step(lasting, 720).tag, of_step(lasting, 720).commit
    lasting.git("tag", "--force", tag, of_step(lasting, 600).commit)
    assert broken(lasting, 720) == {"tag -> commit"}
    lasting.git("tag", "--force", tag, commit)
    assert broken(lasting, 720) == set()


@pytest.mark.parametrize(
    ("kind", "old", "new", "found"),
    [
        ("plan", b'"loss": ', b'"loss": 1', {"run -> records", "commit -> records"}),
        ("gate", b'"reason": "', b'"reason": "surely ', {"run -> records"}),
        ("publication", b'"commit": "', b'"commit": "0', None),
        ("publication", b'"weights_hash": "', b'"weights_hash": "0', None),
        ("checkpoint", b'"fingerprint": "', b'"fingerprint": "0', {"commit -> records"}),
        ("score", b'"split": "selection"', b'"split": "report"', {"DVC cache -> scores"}),
        ("fusion", b'"model.safetensors": [\n   ', b'"model.safetensors": [\n   9', None),
    ],
)
def test_an_edited_record_is_found(
    lasting: Project, kind: str, old: bytes, new: bytes, found: set[str] | None
) -> None:
    """None: what hangs on it is several links."""
    records = lasting.workspace / "records" / kind
    edited = next(
        path
        for path in sorted(records.glob("*.json"))
        if old in path.read_bytes() and _is_of_720(lasting, kind, path)
    )
    with rewritten(edited, old, new):
        seen = broken(lasting, 720)
    assert seen == found if found else len(seen) >= 2


def _is_of_720(project: Project, kind: str, path: Path) -> bool:
    values = json.loads(path.read_text())
    if kind == "plan":
        return bool(values["step"] == 720) and values in project.plans()
    if kind != "score":
        return bool(values["step"] == 720)
    newest = next(c for c in project.records("checkpoint").values() if c["step"] == 720)
    return bool(values["model"] == newest["fingerprint"])


def test_a_checkpoint_that_was_overwritten_since_is_named(lasting: Project) -> None:
    newest = lasting.bucket / "checkpoint-720"
    with rewritten(newest / "config.json", b"{", b"{ "):
        assert broken(lasting, 720) == {"input checkpoint-720"}


def test_a_checkpoint_that_is_gone_breaks_nothing_and_is_named(lasting: Project) -> None:
    newest = lasting.bucket / "checkpoint-720"
    elsewhere = newest.rename(lasting.folder / "gone")
    links = list(verify(opened(lasting), "720"))
    elsewhere.rename(newest)
    assert [link.name for link in links if link.state == "gone"] == ["input checkpoint-720"]
    assert {link.state for link in links} == {"holds", "gone"}


# -- the champion --------------------------------------------------------------------------------


def test_the_champion_is_moved_by_hand_and_back_and_the_next_look_leaves_it_there(
    project: Project,
) -> None:
    done = run(project, "promote", "600", "--reason", "the newer one swears")
    assert done.exit_code == 0, done.output
    assert "version 1" in done.stdout
    assert project.aliases() == {"candidate": "2", "champion": "1"}
    record = champion(opened(project))
    assert record is not None
    assert (record.step, record.reason) == (600, "the newer one swears")
    assert "@" in (record.by or "")
    run(project, "promote", "v1")  # again: nothing to do
    settle_champion.fn(opened(project))
    assert len(project.records("promotion")) == 3
    assert project.aliases()["champion"] == "1"
    for version in ("2", "1"):
        assert run(project, "rollback").exit_code == 0
        assert project.aliases()["champion"] == version
    refused = run(project, "rollback")
    assert "no other champion before" in str(refused.exception)
    assert len(project.records("promotion")) == 5


def test_a_promotion_that_was_killed_before_the_alias_moved_is_finished_by_the_next_look(
    project: Project,
) -> None:
    service = opened(project)
    promote_by_hand(service, of_step(project, 600), **BY_HAND)
    assert project.aliases()["champion"] == "2"
    settle_champion.fn(service)
    assert project.aliases()["champion"] == "1"


def test_a_rollback_that_was_killed_is_finished_by_the_next_and_not_done_twice(
    project: Project,
) -> None:
    service = opened(project)
    rollback_by_hand(service, of_step(project, 600), **BY_HAND)
    done = run(project, "rollback")
    assert done.exit_code == 0
    assert "the rollback of before (decision 3 by someone@somewhere: because)" in done.stderr
    assert project.aliases()["champion"] == "1"
    assert len(project.records("promotion")) == 3


def test_a_rollback_is_one_though_a_backup_of_mlflow_had_brought_the_alias_elsewhere(
    project: Project,
) -> None:
    run(project, "promote", "600")
    run(project, "promote", "720")
    for version in ("1", "2"):
        run(project, "rollback")
        assert project.aliases()["champion"] == version
    client = MlflowClient(tracking_uri=project.mlflow_uri, registry_uri=project.mlflow_uri)
    client.set_registered_model_alias("trial", "champion", "1")
    done = run(project, "rollback")
    assert "the alias champion was not where the records have it" in done.stderr
    assert project.aliases()["champion"] == "1"
    undone = [r["undoes"] for r in project.records("promotion").values() if r["undoes"]]
    assert len(undone) == 3


def test_what_was_never_published_or_would_not_load_is_not_promoted(project: Project) -> None:
    refused = run(project, "promote", "540")
    assert "'540' was never published" in str(refused.exception)
    (artifacts(project, 600) / "model" / "model.safetensors").unlink()
    refused = run(project, "promote", "600")
    assert "would not load: its file model.safetensors is not there" in str(refused.exception)
    assert len(project.records("promotion")) == 2
    assert project.aliases()["champion"] == "2"


# -- retention -----------------------------------------------------------------------------------


def keep(project: Project, **policy: object) -> None:
    file = Path(project.params_file)
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**values, "retention": policy}))


def _never_promoted(project: Project) -> None:
    """As if the fusion of step 600 had never been champion: nothing but the policy holds it."""
    for path in project.workspace.joinpath("records/promotion").glob("*.json"):
        record = PromotionRecord.model_validate_json(path.read_text())
        if record.step == 600:
            path.write_text(record.model_copy(update={"promoted": False}).model_dump_json())


@pytest.fixture
def replaceable(project: Project) -> Project:
    _never_promoted(project)
    return project


def used_blocks(project: Project) -> int:
    folders = ("models", "mlartifacts", "ledger/.dvc/cache")
    places = [str(project.workspace / folder) for folder in folders]
    told = subprocess.run(["du", "-scB1", *places], capture_output=True, text=True, check=True)
    return int(told.stdout.splitlines()[-1].split()[0])


def test_retention_deletes_a_version_with_its_weights_and_all_others_stay_whole(
    replaceable: Project,
) -> None:
    keep(replaceable, last=1)
    foretold = run(replaceable, "prune", "--dry-run").stdout
    assert "stays  version 2 (step-720" in foretold
    assert "the champion" in foretold
    assert "goes   version 1 (step-600" in foretold
    assert len(replaceable.versions()) == 2, "a dry run deletes nothing"
    before = used_blocks(replaceable)
    done = run(replaceable, "prune")
    assert done.exit_code == 0, done.output
    freed = done.stdout.splitlines()[-1]
    assert freed.partition(" freed")[0] in foretold.splitlines()[-1]
    weights = max(p.stat().st_size for p in artifacts(replaceable, 720).rglob("*.safetensors"))
    assert before - used_blocks(replaceable) > weights
    assert float(freed.split()[0]) * 1e6 == pytest.approx(
        before - used_blocks(replaceable), rel=0.1
    )
    assert [version for version, _ in replaceable.versions()] == ["2"]
    assert broken(replaceable, 720) == set()
    gone = {link.name for link in verify(opened(replaceable), "600") if link.state == "gone"}
    assert "version -> fusion.json" in gone
    assert broken(replaceable, 600) == set()
    refused = run(replaceable, "promote", "600")
    assert "deleted by retention: not of the last 1" in str(refused.exception)
    assert run(replaceable, "prune").stdout == "0.0 MB freed\n"


@pytest.mark.parametrize("holding", ["name", "alias", "every", "champion before", "no policy"])
def test_nothing_goes_that_is_kept_by(project: Project, holding: str) -> None:
    policy: dict[str, object] = {"last": 1}
    if holding == "no policy":
        policy = {}
    if holding != "champion before":
        _never_promoted(project)
    if holding == "name":
        policy["keep"] = [of_step(project, 600).tag]
    if holding == "every":
        policy["every"] = 2
    if holding == "alias":
        client = MlflowClient(tracking_uri=project.mlflow_uri, registry_uri=project.mlflow_uri)
        client.set_registered_model_alias("trial", "reviewed", "1")
    keep(project, **policy)
    assert run(project, "prune").exit_code == 0
    assert len(project.versions()) == 2
    assert project.records("retirement") == {}


def test_a_retirement_that_was_killed_is_finished_by_the_next(replaceable: Project) -> None:
    chosen = publications(opened(replaceable))[0]
    record = RetirementRecord(
        fusion=chosen.fusion, step=600, tag=chosen.tag, version=chosen.version, reason="policy"
    )
    opened(replaceable).records.put(chosen.fusion, record)
    assert "deleted version 1" in run(replaceable, "prune").stdout
    assert [version for version, _ in replaceable.versions()] == ["2"]


# -- curves --------------------------------------------------------------------------------------


def drawn(project: Project) -> dict[str, list[int]]:
    """The steps of each metric, once the curves are drawn."""
    with registry_of(opened(project)) as registry:
        draw_curves(registry)
        client, run = registry.client, registry.curves_run()
        return {
            name: [point.step for point in client.get_metric_history(run, name)]
            for name in client.get_run(run).data.metrics
        }


def test_curves_that_are_drawn_again_add_no_point_whatever_became_of_the_memory(
    project: Project,
) -> None:
    memory = project.workspace / "cache" / "curves.json"

    found = drawn(project)
    assert found["loss.raw"] == [420, 480, 540, 600, 660, 720]
    assert all(len(set(steps)) == len(steps) for steps in found.values())
    memory.write_text(memory.read_text()[:100])
    assert drawn(project) == found
    memory.unlink()
    assert drawn(project) == found
    assert set(json.loads(memory.read_text())["logged"]) == found.keys()


def test_points_that_a_restored_backup_of_mlflow_lacks_are_logged_again(project: Project) -> None:
    found = drawn(project)
    with sqlite3.connect(project.workspace / "mlflow.db") as backup:
        backup.execute("DELETE FROM metrics WHERE step > 600")
        backup.execute("DELETE FROM latest_metrics")
        columns = "key, value, timestamp, is_nan, run_uuid, step"
        backup.execute(
            f"INSERT INTO latest_metrics ({columns}) SELECT {columns.replace('step', 'max(step)')} "
            "FROM metrics GROUP BY run_uuid, key"
        )
    backup.close()
    assert drawn(project) == found
