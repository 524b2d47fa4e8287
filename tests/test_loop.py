"""The whole loop on a real trajectory: watch, fuse, gate, ledger, registry, and doing it again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ckptfuse.corpus import read_corpus
from ckptfuse.params import load_params
from ckptfuse.records import PromotionRecord, VetoRecord
from ckptfuse.service import open_service
from ckptfuse.steps.veto import hear_veto
from ckptfuse.veto import to_arrays, veto_key
from tasks.aliases import settle_champion
from tasks.registry import Registry
from tests.conftest import DOMAINS, Project, Trajectory

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_each_published_fusion_has_one_tag_one_version_and_the_champion_alias(
    finished: Project,
) -> None:
    published = finished.records("publication").values()
    fusions = {str(record["version"]): record["fusion"] for record in published}
    assert dict(finished.versions()) == fusions
    assert sorted(finished.git("tag").split()) == sorted(str(record["tag"]) for record in published)
    assert finished.git("rev-list", "--count", "main") == "3"  # the empty ledger and two fusions
    newest = max(published, key=lambda record: int(str(record["step"])))
    assert finished.aliases() == {"candidate": newest["version"], "champion": newest["version"]}


def test_the_fusion_beats_every_single_checkpoint_on_text_that_chose_nothing(
    finished: Project,
) -> None:
    from ckptfuse.overview import overview
    from ckptfuse.params import load_params
    from ckptfuse.service import open_service

    seen = overview(open_service(load_params(Path(finished.params_file))), "report")
    fused = {row.step: row.fused for row in seen.rows}[720]
    assert fused is not None
    assert fused < min(row.loss for row in seen.rows if row.loss is not None)


def test_each_merge_was_measured_against_what_its_rule_had_predicted(finished: Project) -> None:
    judged = {record["fusion"] for record in finished.records("gate").values()}
    assert {plan["fusion"] for plan in finished.plans()} == judged
    for plan in finished.plans():
        assert plan["revision"] == 1, "as decided, and once more with the fusion's loss known"
        own = [merge for merge in plan["merges"] if merge["predicted"] is not None][-1]
        assert own["loss"] == pytest.approx(own["predicted"], abs=0.05)
        assert plan["notes"]["noise_energy"] > 2 * plan["notes"]["noise_energy_error"]
        assert {f"noise_energy.{name}" for name in DOMAINS} <= plan["notes"].keys()
        assert all(member["weight_error"] is not None for member in plan["members"])


def test_watching_again_does_nothing_and_says_so(finished: Project) -> None:
    before = sorted(finished.workspace.joinpath("records").rglob("*.json"))
    done = finished.cli("watch", "--once")
    assert "Nothing to do: 6 checkpoints" in done.stdout
    assert sorted(finished.workspace.joinpath("records").rglob("*.json")) == before
    assert len(finished.versions()) == 2


def test_the_ledger_is_clean_and_a_forced_repro_makes_the_same_weights(
    finished: Project, tmp_path: Path
) -> None:
    ledger = finished.workspace / "ledger"
    tag = finished.git("tag").split()[0]
    clone = tmp_path / "again"
    published = {r["tag"]: r for r in finished.records("publication").values()}[tag]

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    subprocess.run(["git", "clone", "-q", ledger, clone], check=True)
    run("git", "checkout", "-q", tag)
    run("dvc", "cache", "dir", "--local", str(ledger / ".dvc" / "cache"))
    run("dvc", "checkout", "-q", "corpus.dvc")
    run("dvc", "repro", "--quiet", "--force")
    assert "up to date" in run("dvc", "status")
    hashes = [line.strip() for line in (clone / "dvc.lock").read_text().splitlines()]
    assert f"md5: {published['weights_hash']}" in hashes
    metrics = json.loads((clone / "metrics.json").read_text())
    pinned = json.loads(finished.git("show", f"{tag}:metrics.json"))
    assert metrics["gain"]["newest"]["loss"] == pytest.approx(
        pinned["gain"]["newest"]["loss"], abs=1e-4
    )


def test_the_ledger_keeps_what_was_drawn_and_it_is_the_services_corpus(
    finished: Project, trajectory: Trajectory
) -> None:
    ledger = finished.workspace / "ledger"
    assert {read_corpus(load_params(ledger / "params.yaml").corpus).digest} == set(
        finished.records("corpus")
    )
    sources = yaml.safe_load((ledger / "sources.yaml").read_text())
    for name, path in trajectory.corpus.items():
        kept = (ledger / "corpus" / f"{name}.jsonl").read_bytes().splitlines()
        assert set(kept) <= set(path.read_bytes().splitlines())
        assert sources[name]["uri"] == str(path)
        assert 0 < len(kept) <= sources[name]["distinct"]


def test_the_champion_loads_from_the_registry_in_a_fresh_process(finished: Project) -> None:
    program = (
        "import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1]);"
        "pipe = mlflow.transformers.load_model('models:/trial@champion');"
        "print('GENERATED', pipe('import os', max_new_tokens=4)[0]['generated_text']);"
        "served = mlflow.pyfunc.load_model('models:/trial@champion');"
        "print('SERVED', served.predict(['def f('])[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, finished.mlflow_uri],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "GENERATED import os" in done.stdout
    assert "SERVED def f(" in done.stdout


def test_the_weights_of_a_fusion_take_their_disk_blocks_once(finished: Project) -> None:
    """In models/, MLflow's artifacts and DVC's cache together: hard links of one file."""
    folders = [finished.workspace / f for f in ("models", "mlartifacts", "ledger/.dvc/cache")]
    (size,) = {p.stat().st_size for p in folders[0].rglob("*.safetensors")}
    weights = [p for f in folders for p in f.rglob("*") if p.is_file() and p.stat().st_size == size]
    assert len(weights) == 5  # two fusions in each, less what is pruned from models/
    told = subprocess.run(["du", "-cB1", *weights], capture_output=True, text=True, check=True)
    taken = int(told.stdout.splitlines()[-1].split()[0])
    assert taken <= 1.1 * size * len(finished.versions())


def test_the_curves_in_mlflow_are_drawn_by_training_step(finished: Project) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=finished.mlflow_uri)
    experiment = client.get_experiment_by_name("trial")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`ckptfuse.role` = 'curves'")
    raw = client.get_metric_history(run.info.run_id, "loss.raw")
    assert sorted(metric.step for metric in raw) == [420, 480, 540, 600, 660, 720]
    fused = client.get_metric_history(run.info.run_id, "loss.fusion")
    assert sorted(metric.step for metric in fused) == [600, 720]
    by_domain = client.get_metric_history(run.info.run_id, "loss.raw.python")
    assert sorted(metric.step for metric in by_domain) == [420, 480, 540, 600, 660, 720]
    drawn = {item.path for item in client.list_artifacts(run.info.run_id, "figures")}
    assert drawn == {"figures/losses.svg", "figures/weights.svg"}
    for plan in finished.plans():
        (own,) = client.search_runs(
            [experiment.experiment_id], f"tags.`ckptfuse.fusion` = '{plan['fusion']}'"
        )
        weights = client.get_metric_history(own.info.run_id, "weight")
        assert {m.step: m.value for m in weights} == {
            m["step"]: m["weight"] for m in plan["members"]
        }
        (gains,) = client.list_artifacts(own.info.run_id, "figures")
        assert gains.path == "figures/gain_by_domain.svg"


def test_status_and_report_show_what_the_records_say(finished: Project) -> None:
    shown = finished.cli("status").stdout
    assert "champion" in shown
    assert "skipped" in shown
    page = Path(finished.cli("report").stdout.strip()).read_text()
    assert "superseded by step 720" in page
    assert page.count("<svg") == 5
    assert "noise energy" in shown
    (corpus,) = finished.records("corpus").values()
    assert page.count('<td class="word">audit</td>') == len(corpus["domains"])  # type: ignore[arg-type]


def test_fuse_of_a_decided_window_repeats_its_verdict(finished: Project) -> None:
    done = finished.cli("fuse", "--step", "720")
    assert done.stdout.startswith("step 720: publish")
    assert len(finished.versions()) == 2


def test_a_second_watcher_beside_the_first_leaves_the_work_to_it(finished: Project) -> None:
    from ckptfuse.workspace import Workspace

    with Workspace(finished.workspace).lock() as mine:
        assert mine
        done = finished.cli("watch", "--once")
    assert "Another process is at work" in done.stdout


def test_a_candidate_becomes_champion_in_mlflow_once_its_veto_was_heard(
    finished: Project, tmp_path: Path
) -> None:
    """The second fusion, as if a veto had been asked for before it was published."""
    shutil.copytree(finished.folder, tmp_path / "project", symlinks=True)
    project = Project(tmp_path / "project", finished.trajectory)
    params = yaml.safe_load(Path(project.params_file).read_text())
    script = 'import sys; open(sys.argv[2], \'w\').write(\'{"item": "one", "correct": 1}\')'
    command = (sys.executable, "-c", script)
    params["promotion"] = {"veto": {"command": list(command)}}
    params["mlflow"] = {"tracking_uri": project.mlflow_uri}
    Path(project.params_file).write_text(yaml.safe_dump(params))
    service = open_service(load_params(Path(project.params_file)))
    first, second = sorted(service.records.all(PromotionRecord).values(), key=lambda p: p.number)
    (project.workspace / "records" / "promotion" / f"{second.fusion}.json").unlink()
    Registry(service).set_alias("champion", "1")
    known = VetoRecord(model=first.fusion, command=list(command), items=1, correct=1)
    key = veto_key(first.fusion, command)  # its weights are no longer in the workspace
    service.records.put(key, known, to_arrays({"one": True}))

    settle_champion.fn(service)
    assert project.aliases() == {"candidate": "2", "champion": "1"}
    assert [record.model for record in hear_veto(service)] == [second.fusion]
    settle_champion.fn(service)
    assert project.aliases() == {"candidate": "2", "champion": "2"}
    decided = service.records.get(PromotionRecord, second.fusion)
    assert decided is not None
    assert "no veto, 0 items won and 0 lost of 1" in decided.reason
