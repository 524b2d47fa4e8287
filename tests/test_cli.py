"""The command line: its answers, its refusals, and what it loads before it can give them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import Project, Trajectory


def change_params(project: Project, **changes: object) -> None:
    file = Path(project.params_file)
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))


def test_help_is_given_without_loading_what_is_heavy() -> None:
    program = (
        "import sys; from flows.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'prefect', 'mlflow', 'boto3'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "Watch the bucket" in done.stdout
    assert done.stdout.rstrip().endswith("[]")


def test_no_params_file_is_told_with_what_to_do(project: Project) -> None:
    Path(project.params_file).unlink()
    told = project.cli("status", status=2).stderr
    assert "params.yaml: no such file" in told
    assert "--params" in told


def test_an_unknown_key_is_told_with_its_nearest_neighbour(project: Project) -> None:
    change_params(project, gate={"minimum_gian": 0.1})
    told = project.cli("watch", "--once", status=2).stderr
    assert "unknown key 'gate.minimum_gian' (did you mean 'minimum_gain'?" in told


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"bucket": None}, 2, "no bucket: set `bucket`"),
        ({"bucket": "nowhere"}, 1, "nowhere: no such folder"),
        ({"rule": {"name": "greedyy"}}, 2, "'greedyy' is unknown; there are auto, bayes"),
        ({"corpus": {}}, 2, "give corpus.domains"),
        ({"corpus": {"domains": {"a": {"path": "none.jsonl"}}}}, 2, "none.jsonl"),
        ({"window": {"size": 2, "minimum": 3}}, 2, "minimum 3 exceeds size 2"),
        ({"workspace": "s3://bucket/x"}, 2, "the workspace is a local or mounted folder"),
        ({"workspace": "params.yaml"}, 2, "no folder can be made there (Not a directory)"),
        ({"workspace": "/proc/none"}, 2, "no folder can be made there (No such file"),
        ({"workspace": "bucket/own"}, 2, "lies in the bucket"),
        ({"bucket": "s3://a bucket/run"}, 2, "'a bucket' is no valid name of an S3 bucket"),
    ],
)
def test_a_watch_that_cannot_work_is_refused_before_any_server_starts(
    project: Project, changes: dict[str, object], status: int, said: str
) -> None:
    change_params(project, **changes)
    assert said in project.cli("watch", "--once", status=status).stderr
    assert project.records("checkpoint") == {}


def test_a_corpus_line_that_is_no_json_is_named(project: Project) -> None:
    (project.folder / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    change_params(project, corpus={"domains": {"a": {"path": "bad.jsonl"}}})
    assert "bad.jsonl, line 2" in project.cli("watch", "--once", status=2).stderr


@pytest.mark.parametrize("command", ["status", "report", "metrics --once", "prune --dry-run"])
def test_a_workspace_that_is_a_file_is_one_line(project: Project, command: str) -> None:
    change_params(project, workspace="params.yaml")
    told = project.cli(*command.split(), status=2).stderr
    assert "correct `workspace`" in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["score", "ckpt"], "Missing option '--corpus'"),
        (["score", "ckpt", "--corpus", "file.jsonl"], "NAME=PATH is expected"),
        (["score", "ckpt", "--corpus", "a=b", "--corpus", "a=c"], "'a' is given twice"),
        (["score", "ckpt", "--corpus", "a=b", "--split", "test"], "selection, audit or report"),
        (["score", "c", "--corpus", "a=b", "--model", "absent"], "absent: no config.json"),
        (
            ["score", "c", "--corpus", "a=b", "--converter", "foo", "--model", "absent"],
            "package.module:function is expected",
        ),
        (["merge", "out", "ckpt"], "CHECKPOINT=WEIGHT is expected"),
        (["merge", "out", "ckpt=heavy"], "a weight is no number"),
        (["merge", "out", "ckpt=0.5", "--dtype", "int8"], "float32, bfloat16 or float16"),
        (["merge", "out", "ckpt=inf"], "finite numbers"),
        (["fuze"], "No such command 'fuze'"),
    ],
)
def test_wrong_usage_ends_with_status_2(project: Project, arguments: list[str], said: str) -> None:
    assert said in project.cli(*arguments, status=2).stderr


def test_the_corpus_is_looked_through_by_hand_or_as_params_name_it(project: Project) -> None:
    texts = [" ".join(f"word{n // 3}x{k}" for k in range(40)) + f" {n}" for n in range(90)]
    (project.folder / "own").mkdir()
    for number, text in enumerate([*texts, texts[0]]):
        (project.folder / "own" / f"{number}.txt").write_text(text)
    by_hand = json.loads(project.cli("corpus", "own=own", "--json").stdout)
    held = by_hand["domains"]["own"]
    assert sum(split["documents"] for split in held.values()) == 90
    assert held["audit"]["near_duplicates"]["selection"] > 0
    assert (by_hand["sources"]["own"]["documents"], by_hand["tokens"]) == (91, None)
    change_params(project, corpus={"domains": {"own": {"path": "own"}}})
    told = project.cli("corpus")
    assert f"{held['audit']['bytes']:,}" in told.stdout
    assert "% alike:" in told.stdout
    assert "91 documents of 0.0 MB in 91 files, 1 of them copies" in told.stderr


@pytest.mark.usefixtures("prefect_server")
def test_fuse_before_anything_is_scored_says_what_to_do(project: Project) -> None:
    told = project.cli("fuse", status=2).stderr
    assert "scored are: none" in told
    assert "ckptfuse watch --once" in told


@pytest.mark.usefixtures("prefect_server")
def test_a_look_that_can_score_nothing_says_why_and_fails(project: Project) -> None:
    project.land(420, 480)
    change_params(project, scoring={"block_length": 4096})
    told = project.cli("watch", "--once", status=1)
    assert told.stdout.startswith("2 could not be read or scored, checkpoint-480 among them (")
    assert told.stdout.strip().endswith("; the next look tries again.")
    assert told.stderr.count("set scoring.block_length") == 2
    told = project.cli("status")
    assert "checkpoint-420 could not be read or scored: " in told.stdout


def test_score_equals_transformers_own_loss(project: Project, trajectory: Trajectory) -> None:
    """On one context, begin-of-sequence token first, as its documentation computes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = trajectory.bucket / "checkpoint-720"
    text = "def main(arguments):\n    return [name for name in arguments if name]\n" * 8
    (project.folder / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    told = project.cli("score", str(checkpoint), "--corpus", "own=text.jsonl", "--json")
    ours = json.loads(told.stdout)["domains"]["own"]

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) < 256, "the text must fit one context"
    tokens = torch.tensor([[tokenizer.bos_token_id, *ids]])
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        theirs = model(input_ids=tokens, labels=tokens).loss.item()
    assert ours["loss"] == pytest.approx(theirs, rel=1e-5)
    assert ours["tokens"] == len(ids)
    assert ours["perplexity"] == pytest.approx(math.exp(theirs), rel=1e-4)
    bits = theirs * len(ids) / len(text.encode()) / math.log(2)
    assert ours["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert ours["standard_error"] is None  # a single document


def test_merge_is_the_weighted_average_and_says_where_it_is(
    project: Project, trajectory: Trajectory
) -> None:
    paths = [trajectory.bucket / f"checkpoint-{step}" for step in (600, 660, 720)]
    weights = (0.2, 0.3, 0.5)
    inputs = [f"{path}={weight}" for path, weight in zip(paths, weights, strict=True)]
    done = project.cli("merge", "merged", *inputs)
    assert done.stdout == "merged\n"
    merged = load_file(project.folder / "merged" / "model.safetensors")
    parts = [load_file(path / "model.safetensors") for path in paths]
    for name, values in merged.items():
        expected = sum(w * part[name].double() for w, part in zip(weights, parts, strict=True))
        assert torch.allclose(values.double(), expected, atol=1e-6)
    copied = {path.name for path in (project.folder / "merged").iterdir()}
    assert {"config.json", "tokenizer.json", "fusion.json", "README.md"} <= copied
    assert "trainer_state.json" not in copied


def test_merge_never_writes_over_what_is_there(project: Project, trajectory: Trajectory) -> None:
    (project.folder / "taken").mkdir()
    (project.folder / "taken" / "file").write_text("precious")
    inputs = [f"{trajectory.bucket}/checkpoint-{step}=0.5" for step in (660, 720)]
    assert "is there already" in project.cli("merge", "taken", *inputs, status=2).stderr
    assert [path.name for path in (project.folder / "taken").iterdir()] == ["file"]


def test_a_pattern_that_names_no_tensor_is_told_before_anything_is_written(
    project: Project, trajectory: Trajectory
) -> None:
    inputs = [f"{trajectory.bucket}/checkpoint-{step}=0.5" for step in (660, 720)]
    options = ["--copy", "*.norm.weight", "--copy", "*.qscale"]
    told = project.cli("merge", "misspelt", *inputs, *options, status=2).stderr
    assert "--copy '*.qscale': no tensor of " in " ".join(told.split())
    assert not (project.folder / "misspelt").exists()


def test_a_merge_of_unlike_models_names_the_difference(
    project: Project, trajectory: Trajectory
) -> None:
    from tests.helpers import write_checkpoint

    other = write_checkpoint(project.folder / "other", {"weight": torch.ones(2)})
    told = project.cli(
        "merge", "out", f"{trajectory.bucket}/checkpoint-720=0.5", f"{other.uri}=0.5", status=1
    )
    assert "weight" in told.stderr
    assert not (project.folder / "out").exists()


def test_a_prefect_server_that_is_named_and_not_there_is_told(project: Project) -> None:
    nowhere = "http://127.0.0.1:9/api"
    told = project.cli("watch", "--once", status=1, PREFECT_API_URL=nowhere).stderr
    assert f"Prefect's server at {nowhere} does not answer" in told
