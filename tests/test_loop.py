"""The whole loop on a real trajectory: watch, fuse, gate, ledger, registry, and doing it again."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from ckptfuse.corpus import Document, read_corpus
from ckptfuse.params_loading import load_params
from ckptfuse.records import PromotionRecord
from ckptfuse.score_files import read_scores
from ckptfuse.service import open_service
from flows.commands.service import sentence
from flows.watch import watch
from tasks.aliases import is_settled, settle_champion
from tasks.registry import Registry
from tests.conftest import DOMAINS, TOKENS_PER_STEP, Project, Trajectory, environment
from tests.observing import runs_in_prefect

pytestmark = pytest.mark.usefixtures("prefect_server")


@dataclass(frozen=True)
class Runs:
    """The finished project's runs in MLflow; ``find`` takes a tag of ours and its value."""

    client: MlflowClient
    find: Callable[[str, str], Run]

    def history(self, metric: str) -> dict[int, float]:
        """Step -> value, of the trajectory's run."""
        run = self.find("role", "curves").info.run_id
        return {point.step: point.value for point in self.client.get_metric_history(run, metric)}


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
    from ckptfuse.service import open_service

    seen = overview(open_service(load_params(Path(finished.params_file))), "report")
    fused = {row.step: row.fused for row in seen.rows}[720]
    assert fused is not None
    assert fused < min(row.loss for row in seen.rows if row.loss is not None)


def test_each_merge_was_measured_against_what_its_rule_had_predicted(finished: Project) -> None:
    judged = {record["fusion"] for record in finished.records("gate").values()}
    assert {plan["fusion"] for plan in finished.plans()} == judged
    for plan in finished.plans():
        assert plan["revision"] >= 1, "as decided, and once more with the fusion's loss known"
        own = [merge for merge in plan["merges"] if merge["predicted"] is not None][-1]
        assert own["loss"] == pytest.approx(own["predicted"], abs=0.05)
        assert plan["notes"]["noise_energy"] > 2 * plan["notes"]["noise_energy_error"]
        assert {f"noise_energy.{name}" for name in DOMAINS} <= plan["notes"].keys()
        assert all(member["weight_error"] is not None for member in plan["members"])


def test_watching_again_does_nothing_and_says_so(finished: Project) -> None:
    before = sorted(finished.workspace.joinpath("records").rglob("*.json"))
    runs = runs_in_prefect(finished)
    done = finished.cli("watch", "--once")
    assert "Nothing to do: 6 checkpoints" in done.stdout
    assert sorted(finished.workspace.joinpath("records").rglob("*.json")) == before
    assert len(finished.versions()) == 2
    assert len(runs_in_prefect(finished)) == len(runs) > 0


def test_a_scheduled_look_that_finds_nothing_is_a_run_without_tasks(finished: Project) -> None:
    assert watch(finished.params_file).did_nothing
    look = runs_in_prefect(finished)[0]
    assert (look.name, look.state_name) == ("watch", "Completed")
    with get_client(sync_client=True) as client:
        parents = FlowRunFilter(id=FlowRunFilterId(any_=[look.id]))
        assert client.read_task_runs(flow_run_filter=parents) == []


def test_a_fresh_clone_elsewhere_makes_the_same_bytes_scores_and_verdict(
    finished: Project, tmp_path: Path
) -> None:
    """With nothing but the bucket and the corpus, in other places, on another number of threads."""
    ledger, clone = finished.workspace / "ledger", tmp_path / "elsewhere" / "clone"
    tag = finished.git("tag").split()[0]
    published = {r["tag"]: r for r in finished.records("publication").values()}[tag]
    shutil.copytree(finished.bucket, tmp_path / "bucket")
    subprocess.run(["git", "clone", "-q", "--branch", tag, ledger, clone], check=True)
    shutil.copytree(ledger / "corpus", clone / "corpus")
    moved = {
        "CKPTFUSE_BUCKET": str(tmp_path / "bucket"),
        "CKPTFUSE_SCORING__THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # other tests have use for the cores that threads wait on
    }
    done = subprocess.run(
        ["dvc", "repro"], cwd=clone, env=environment() | moved, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Running stage 'evaluate'" in done.stdout
    lock = yaml.safe_load((clone / "dvc.lock").read_text())["stages"]
    assert lock["fuse"]["outs"][0]["md5"] == published["weights_hash"]
    steps = sorted(path.stem for path in (clone / "scores").iterdir())
    assert len(steps) == 4
    for step in steps:
        ours, theirs = (read_scores(f / "scores" / f"{step}.npz") for f in (clone, ledger))
        for (key, _, losses), (their_key, _, their_losses) in zip(ours, theirs, strict=True):
            assert key == their_key
            np.testing.assert_allclose(losses["nll"], their_losses["nll"], rtol=1e-5)
    metrics = json.loads((clone / "metrics.json").read_text())
    before = json.loads(finished.git("show", f"{tag}:metrics.json"))
    assert metrics["gate"]["passed"] == before["gate"]["passed"] is True
    for model in ("fusion", "best", "newest"):
        found, known = metrics["report"][model]["loss"], before["report"][model]["loss"]
        assert found == pytest.approx(known, abs=1e-5)
    with_theirs = environment() | moved | {"CKPTFUSE_SCORING__THREADS": "1"}
    stage = f"score@{steps[0]}"
    subprocess.run(["dvc", "repro", "-f", "-s", stage], cwd=clone, env=with_theirs, check=True)
    same, theirs = ((f / "scores" / f"{steps[0]}.npz").read_bytes() for f in (clone, ledger))
    assert same == theirs, "on as many threads as the service's, every byte"


def test_the_ledger_keeps_what_was_drawn_and_it_is_the_services_corpus(
    finished: Project, trajectory: Trajectory
) -> None:
    ledger = finished.workspace / "ledger"
    kept = read_corpus(load_params(ledger / "params.yaml").corpus)
    assert {kept.digest} == set(finished.records("corpus"))
    sources = yaml.safe_load((ledger / "sources.yaml").read_text())
    for name, path in trajectory.corpus.items():
        texts = [json.loads(line)["text"] for line in path.read_bytes().splitlines()]
        whole = {Document.of(text).digest: text for text in texts}
        for document in kept.domains[name]:
            assert whole[document.digest].startswith(document.text)
        assert sources[name]["uri"] == str(path)
        assert 0 < len(kept.domains[name]) <= sources[name]["distinct"]


def test_the_weights_of_a_fusion_take_their_disk_blocks_once(finished: Project) -> None:
    """In models/, MLflow's artifacts and DVC's cache together: hard links of one file."""
    folders = [finished.workspace / f for f in ("models", "mlartifacts", "ledger/.dvc/cache")]
    (size,) = {p.stat().st_size for p in folders[0].rglob("*.safetensors")}
    weights = [p for f in folders for p in f.rglob("*") if p.is_file() and p.stat().st_size == size]
    assert len(weights) == 5  # two fusions in each, less what is pruned from models/
    told = subprocess.run(["du", "-cB1", *weights], capture_output=True, text=True, check=True)
    taken = int(told.stdout.splitlines()[-1].split()[0])
    assert taken <= 1.1 * size * len(finished.versions())


RAW_STEPS, FUSED_STEPS = [420, 480, 540, 600, 660, 720], [600, 720]


@pytest.fixture
def runs(finished: Project) -> Runs:
    client = MlflowClient(tracking_uri=finished.mlflow_uri)
    experiment = client.get_experiment_by_name("trial")
    assert experiment is not None

    def find(tag: str, value: str) -> Run:
        wanted = f"tags.`ckptfuse.{tag}` = '{value}'"
        (run,) = client.search_runs([experiment.experiment_id], wanted)
        return run

    return Runs(client, find)


@pytest.mark.parametrize("split", ["", "selection/", "audit/"])
def test_losses_and_perplexities_are_in_mlflow_by_training_step(runs: Runs, split: str) -> None:
    """Raw, best single and merged; of the target and of each domain; on report text by default."""
    models = {"raw": RAW_STEPS, "best_single": FUSED_STEPS, "fusion": FUSED_STEPS}
    for model, steps in models.items():
        for domain in ("", *(f".{name}" for name in DOMAINS)):
            losses = runs.history(f"{split}loss.{model}{domain}")
            perplexities = runs.history(f"{split}perplexity.{model}{domain}")
            assert sorted(losses) == sorted(perplexities) == steps
            for step, loss in losses.items():
                assert perplexities[step] == pytest.approx(math.exp(loss))


def test_the_trajectory_in_mlflow_has_tokens_figures_and_what_was_saved(runs: Runs) -> None:
    assert runs.history("tokens") == {step: step * TOKENS_PER_STEP for step in RAW_STEPS}
    saved = runs.history("steps_saved")
    assert saved.keys() <= set(FUSED_STEPS)
    run = runs.find("role", "curves")
    drawn = {item.path for item in runs.client.list_artifacts(run.info.run_id, "figures")}
    assert drawn == {"figures/losses.svg", "figures/weights.svg"}


def test_the_run_of_a_fusion_has_weights_by_checkpoint_and_gains_by_domain(
    finished: Project, runs: Runs
) -> None:
    for plan in finished.plans():
        run = runs.find("fusion", plan["fusion"])
        weights = runs.client.get_metric_history(run.info.run_id, "weight")
        assert {m.step: m.value for m in weights} == {
            m["step"]: m["weight"] for m in plan["members"]
        }
        assert {f"gain.newest.{name}" for name in DOMAINS} <= run.data.metrics.keys()
        (gains,) = runs.client.list_artifacts(run.info.run_id, "figures")
        assert gains.path == "figures/gain_by_domain.svg"


def test_the_corpora_are_datasets_of_the_runs_with_their_digests(
    finished: Project, runs: Runs
) -> None:
    found = [runs.find("role", "curves")]
    found += [runs.find("fusion", plan["fusion"]) for plan in finished.plans()]
    (corpus,) = finished.records("corpus")
    logged = [[item.dataset for item in run.inputs.dataset_inputs] for run in found]
    assert [{d.name for d in datasets} for datasets in logged] == [set(DOMAINS)] * 3
    assert len({d.digest for datasets in logged for d in datasets}) == len(DOMAINS)
    for dataset in logged[0]:
        assert json.loads(dataset.source) == {"uri": str(finished.trajectory.corpus[dataset.name])}
        profile = json.loads(dataset.profile)
        assert profile["corpus"] == corpus
        kept = finished.workspace / "ledger" / "corpus" / f"{dataset.name}.jsonl"
        assert sum(profile["drawn"].values()) == len(kept.read_bytes().splitlines())


def test_status_and_report_show_what_the_records_say(finished: Project) -> None:
    shown = finished.cli("status").stdout
    assert "champion" in shown
    assert "skipped" in shown
    page = Path(finished.cli("report").stdout.strip()).read_text()
    assert "superseded by checkpoint-720" in page
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
    assert not service.workspace.model(first.fusion).exists()

    assert not is_settled(service)
    assert settle_champion.fn(service) == []
    assert is_settled(service), "until an answer comes"
    assert project.aliases() == {"candidate": "2", "champion": "1"}
    heard = [f"fusion {one.fusion[:12]}: 1 of 1 items correct" for one in (first, second)]
    assert project.cli("veto").stdout.splitlines() == heard
    assert not is_settled(service)
    summary = watch(project.params_file)
    assert project.aliases() == {"candidate": "2", "champion": "2"}
    decided = service.records.get(PromotionRecord, second.fusion)
    assert decided is not None
    assert "no veto, 0 items won and 0 lost of 1" in decided.reason
    assert not summary.did_nothing
    assert sentence(summary) == f"champion: step 720 ({decided.reason})"
