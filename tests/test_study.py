"""``ckptfuse study`` and ``ckptfuse backfill`` on a real trajectory."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import Project, Trajectories, Trajectory, make_project

RULES = "latest,uniform,linear,calibrated"


@pytest.fixture(scope="module")
def studied(trajectories: Trajectories, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose command line has studied the constant run against its decay."""
    folder = tmp_path_factory.mktemp("study") / "project"
    tokens = {"selection": 3_000, "audit": 6_000, "report": 1_000}
    project = make_project(
        folder, trajectories.constant, corpus={"tokens": tokens, "tokens_per_document": 256}
    )
    for step in (540, 600, 660, 720):
        source = trajectories.decayed.bucket / f"checkpoint-{step}"
        shutil.copytree(source, folder / "decay" / source.name, copy_function=shutil.copy2)
    (folder / "first.md").write_text(study(project).stdout)
    return project


def study(project: Project, *more: str) -> subprocess.CompletedProcess[str]:
    corpus = project.trajectory.corpus
    return project.cli(
        "study", str(project.trajectory.bucket), "--corpus", f"python={corpus['python']}",
        "--out-of-distribution", f"prose={corpus['prose']}", "--rules", RULES,
        "--windows", "2,4", "--positions", "2", "--decay-branch", "decay",
        "--tokens-per-step", "1024", "--params", project.params_file, "--folder", "out", *more,
    )  # fmt: skip


def test_a_study_says_what_each_rule_gained_and_saved(studied: Project) -> None:
    page = (studied.folder / "first.md").read_text()
    assert page == (studied.folder / "out" / "study.md").read_text()
    for heading in ("In distribution", "Out of distribution", "by window length", "by kind",
                    "Compute saved"):  # fmt: skip
        assert heading in page
    assert "6 checkpoints, steps 420 to 720" in page
    assert "<svg" in (studied.folder / "out" / "losses.svg").read_text()


def test_a_study_that_is_repeated_measures_nothing_and_says_the_same(studied: Project) -> None:
    scores = studied.folder / "out" / "records" / "score"
    before = {path.name: path.stat().st_mtime_ns for path in scores.iterdir()}
    found = json.loads(study(studied, "--json").stdout)
    assert {path.name: path.stat().st_mtime_ns for path in scores.iterdir()} == before
    assert found == json.loads((studied.folder / "out" / "study.json").read_text())
    assert (studied.folder / "first.md").read_text() == (
        studied.folder / "out" / "study.md"
    ).read_text()
    _check(found)


def _check(found: dict) -> None:  # type: ignore[type-arg]
    assert found["domains"] == {"in_distribution": ["python"], "out_of_distribution": ["prose"]}
    places = [(len(window["steps"]), window["steps"][-1]) for window in found["windows"]]
    assert places == [(2, 600), (4, 600), (2, 720), (4, 720)]
    by_rule = {row["rule"]: row for row in found["rules"]}
    gain = {rule: row["gain"]["newest"]["in_distribution"] for rule, row in by_rule.items()}
    assert gain["latest"] == {"mean": 0.0, "standard_error": 0.0}
    # The rate is constant: averaging helps, and `calibrated` finds that out with one merge or so.
    assert gain["uniform"]["mean"] > 2 * gain["uniform"]["standard_error"] > 0
    assert gain["calibrated"]["mean"] > gain["uniform"]["mean"] - 0.01
    assert by_rule["uniform"]["evaluations"] == 0
    assert 1 <= by_rule["calibrated"]["evaluations"] <= 3
    assert by_rule["calibrated"]["worst_regret"] < 0.02
    # A step of training is 6 N x 1024; scoring some hundred thousand tokens costs dozens.
    assert found["parameters"] > 100_000
    saved = by_rule["uniform"]["steps_saved"]
    assert saved["median_net"] < saved["median"]


def test_the_decay_branch_is_drawn_from_the_step_it_left_the_run(studied: Project) -> None:
    found = json.loads((studied.folder / "out" / "study.json").read_text())
    assert [point["step"] for point in found["decay_branch"]] == [540, 600, 660, 720]
    assert "decay branch" in (studied.folder / "out" / "losses.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["study", "b"], "Missing option '--corpus'"),
        (["study", "b", "--corpus", "text.jsonl"], "NAME=PATH is expected"),
        (["study", "b", "--corpus", "a=b", "--windows", "4,one"], "whole numbers from 2 on"),
        (["study", "b", "--corpus", "a=b", "--windows", "1"], "whole numbers from 2 on"),
        (["study", "b", "--corpus", "a=b", "--rules", "unifrom"], "'unifrom' is unknown"),
        (["study", "b", "--corpus", "a=b", "--tokens-per-step", "0"], "more than 0 is expected"),
        (["study", "bucket", "--corpus", "a=b", "--out-of-distribution", "a=c"], "named both"),
        (["study", "bucket", "--corpus", "a=none.jsonl"], "none.jsonl"),
        (["backfill", "--from", "9", "--to", "3"], "nothing lies between"),
        (["backfill", "elsewhere", "--corpus", "a=b"], "name another for"),
        (["backfill", "--workspace", "bucket/ours"], "lies in the bucket"),
        (["backfill", "--every", "0"], "Invalid value for '--every'"),
    ],
)
def test_what_cannot_be_studied_or_replayed_is_told(
    project: Project, arguments: list[str], said: str
) -> None:
    (project.folder / "elsewhere").mkdir()
    assert said in project.cli(*arguments, status=2).stderr


def test_an_empty_bucket_is_told(project: Project) -> None:
    text = project.trajectory.corpus["python"]
    told = project.cli("study", "bucket", "--corpus", f"python={text}", status=2).stderr
    assert "no complete checkpoint there" in told


@pytest.mark.usefixtures("prefect_server")
def test_a_backfill_replays_the_steps_that_are_asked_for_once(
    trajectory: Trajectory, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project", trajectory)
    values = yaml.safe_load(Path(project.params_file).read_text())
    domains = values["corpus"].pop("domains")
    Path(project.params_file).write_text(yaml.safe_dump({**values, "bucket": None}))
    arguments = [
        "backfill", str(trajectory.bucket), "--every", "2", "--from", "440", "--to", "720",
        "--corpus", f"python={domains['python']['path']}",
    ]  # fmt: skip
    first = project.cli(*arguments)
    scored = {int(str(record["step"])) for record in project.records("checkpoint").values()}
    assert scored == {480, 600, 720}
    (plan,) = project.plans()
    assert [member["step"] for member in plan["members"]] == [480, 600, 720]
    assert "3 scored" in first.stdout
    assert " 720 " in first.stdout, "the table of raw against merged"
    page = project.workspace / "report" / "index.html"
    assert str(page) in first.stderr
    assert "raw checkpoint" in page.read_text()
    assert "Nothing to do: " in project.cli(*arguments).stdout
