"""params.yaml: where a value comes from, and how a wrong one is told."""

import os
from pathlib import Path

import pytest
import yaml

from ckptfuse.devices import VISIBLE
from ckptfuse.errors import ConfigurationError
from ckptfuse.params import Params
from ckptfuse.params_file import read_file
from ckptfuse.params_loading import default_params, load_params

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_settings_of_this_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("CKPTFUSE_")]:
        monkeypatch.delenv(name)


def loaded(folder: Path, text: str = "") -> Params:
    (folder / "params.yaml").write_text(text)
    return load_params(folder / "params.yaml")


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as told:
        loaded(folder, text)
    assert str(folder / "params.yaml") in str(told.value)
    return str(told.value)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    params = loaded(tmp_path)
    assert params.rule.name == "calibrated"
    assert (params.window.size, params.gate.alpha, params.bucket) == (8, 0.05, None)


def test_the_environment_stands_over_the_file_and_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTFUSE_GATE__MINIMUM_GAIN", "0.25")
    monkeypatch.setenv("CKPTFUSE_BUCKET", "s3://from/environment")
    params = loaded(tmp_path, "bucket: s3://from/file\ngate: {minimum_gain: 0.5, alpha: 0.01}\n")
    assert params.bucket == "s3://from/environment"
    assert (params.gate.minimum_gain, params.gate.alpha) == (0.25, 0.01)
    assert params.gate.domain_tolerance == 0.01


def test_a_file_is_named_by_argument_then_environment_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("params.yaml", "environment.yaml", "argument.yaml"):
        (tmp_path / name).write_text(f"trajectory: {name}")
    monkeypatch.chdir(tmp_path)
    assert load_params().trajectory == "params.yaml"
    monkeypatch.setenv("CKPTFUSE_PARAMS", str(tmp_path / "environment.yaml"))
    assert load_params().trajectory == "environment.yaml"
    assert load_params(tmp_path / "argument.yaml").trajectory == "argument.yaml"


def test_relative_paths_are_taken_from_the_files_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
        bucket: runs/bucket
        corpus:
          tokenizer: tok
          domains: {a: {path: text/a.jsonl}, b: {path: /abs/b.jsonl}, c: {path: s3://b/c.jsonl}}
    """
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    params = loaded(tmp_path, text)
    assert params.bucket == f"{tmp_path}/runs/bucket"
    assert params.workspace == f"{tmp_path}/workspace"
    assert params.corpus.tokenizer == f"{tmp_path}/tok"
    assert [domain.path for domain in params.corpus.domains.values()] == [
        f"{tmp_path}/text/a.jsonl",
        "/abs/b.jsonl",
        "s3://b/c.jsonl",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gaet: {alpha: 0.1}", ["unknown key 'gaet'", "did you mean 'gate'?"]),
        (
            "gate: {minimal_gain: 0.1}",
            ["'gate.minimal_gain'", "did you mean 'minimum_gain'?", "domain_tolerance"],
        ),
        (
            "corpus: {domains: {a: {path: x, wieght: 1}}}",
            ["'corpus.domains.a.wieght'", "did you mean 'weight'?"],
        ),
        ("xyzzy: 1", ["unknown key 'xyzzy'", "accepted here: trajectory, corpus"]),
    ],
)
def test_an_unknown_key_is_named_with_what_was_probably_meant(
    tmp_path: Path, text: str, said: list[str]
) -> None:
    message = refusal(tmp_path, text)
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gate: {alpha: 2}", ["gate.alpha", "less than 1", "found 2"]),
        ("gate: {alpha: soon}", ["gate.alpha", "found 'soon'"]),
        ("window: {size: 2, minimum: 3}", ["window", "minimum 3 exceeds size 2"]),
        ("window: {size: 1}", ["window.size", "found 1"]),
        ("window: [3]", ["window", "found [3]"]),
        ("scoring: {device: tpu}", ["scoring.device", "'cuda'", "found 'tpu'"]),
        ("fuse: {dtype: int8}", ["fuse.dtype", "bfloat16"]),
        ("corpus: {domains: {a/b: {path: x}}}", ["corpus.domains", "'a/b'"]),
        ("corpus: {domains: {a: {path: x, weight: 0}}}", ["weight 0"]),
        ("corpus: {domains: {a: {weight: 1}}}", ["corpus.domains.a.path"]),
        ("corpus: {domains: {-a: {path: x}}}", ["corpus.domains", "'-' not first"]),
        ("corpus: {domains: {a: {path: ''}}}", ["corpus.domains.a.path", "found ''"]),
        ("corpus: {domains: {a: {path: x, weight: .inf}}}", ["corpus.domains.a.weight", "finite"]),
        ("corpus: {shares: {selection: .inf}}", ["corpus.shares.selection", "finite"]),
        ("trajectory: a b", ["trajectory", "'a b'"]),
        ("trajectory: ..", ["trajectory", "'-' and '.' not first"]),
        ("trajectory: ''", ["trajectory"]),
        ("workspace: s3://b/w", ["workspace", "local or mounted folder"]),
        ("workspace: file:///w", ["workspace", "local or mounted folder"]),
        ("workspace: ''", ["workspace", "found ''"]),
        ("watch: {interval_seconds: .inf}", ["watch.interval_seconds"]),
        ("watch: {interval_seconds: 1.0e+300}", ["watch.interval_seconds", "less than or equal"]),
        ("watch: {settle_seconds: .nan}", ["watch.settle_seconds"]),
        ("scoring: {threads: 1000000000000}", ["scoring.threads", "4096"]),
        ("scoring: {command: python x.py}", ["scoring.command", "a list was expected"]),
        (
            "ledger: {dvc_remote: 'https://bot:secret@host/x'}",
            ["ledger.dvc_remote", "committed", "found 'https://...@host/x'"],
        ),
        ("versions: held", ["versions: a section of `key: value` was expected"]),
        ('bucket: "a\\0b"', ["line 1", "NUL"]),
        (
            "retention: {last: 5}\nbucket: b\nretention: {every: 3}",
            ["line 3", "'retention' is given again, after line 1"],
        ),
        ("watch:\n  marker: a\n  marker: b", ["line 3", "'marker' is given again"]),
        ("watch: {pattern: 'step(\\d+)'}", ["watch.pattern", "(?P<step>...)"]),
        ("watch: {pattern: '('}", ["watch.pattern", "no regular expression"]),
        ("gate: {alpha: 2}\nwindow: {size: 1}", ["gate.alpha", "window.size"]),
        ("- a\n- b", ["a mapping of sections"]),
        ("a: [", ["not YAML"]),
        ("a: !!python/object/apply:os.getcwd []", ["not YAML"]),
        ("1: 2", ["mapping of sections"]),
    ],
)
def test_a_value_that_cannot_be_used_is_named_by_its_key(
    tmp_path: Path, text: str, said: list[str]
) -> None:
    message = refusal(tmp_path, text)
    assert all(part in message for part in said), message


@pytest.mark.parametrize("name", ["2024-run", "7b", "run.2", "_x"])
def test_a_name_may_begin_with_a_digit(tmp_path: Path, name: str) -> None:
    assert loaded(tmp_path, f"trajectory: {name}").trajectory == name
    domain = name.replace(".", "-")
    assert (
        domain in loaded(tmp_path, f"corpus: {{domains: {{{domain}: {{path: x}}}}}}").corpus.domains
    )


def test_a_section_of_comments_alone_is_its_defaults(tmp_path: Path) -> None:
    text = """
        corpus: {domains: , tokens: }
        watch:
          # interval_seconds: 5
        promotion: {veto: }
        window: {boundaries: }
        retention: {keep: }
    """
    assert loaded(tmp_path, text) == loaded(tmp_path)


def test_an_empty_text_is_no_text(tmp_path: Path) -> None:
    empty = """
        bucket: ''
        corpus: {tokenizer: ''}
        scoring: {model: ' ', converter: ''}
        watch: {marker: '', pattern: ''}
        mlflow: {tracking_uri: '', artifact_root: '', model: ''}
        ledger: {remote: '', dvc_remote: ''}
    """
    assert loaded(tmp_path, empty) == loaded(tmp_path)


@pytest.mark.parametrize(
    ("bucket", "workspace"),
    [
        ("bucket", "bucket"),
        ("bucket", "bucket/deep/workspace"),
        ("bucket", "x/../bucket"),
        ("bucket", "link/workspace"),
        ("link", "bucket"),
        ("file://{folder}/bucket", "bucket"),
        (".", "workspace"),
    ],
)
def test_a_workspace_in_the_trainers_bucket_is_refused(
    tmp_path: Path, bucket: str, workspace: str
) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "link").symlink_to("bucket")
    text = f"bucket: {bucket.format(folder=tmp_path)}\nworkspace: {workspace}"
    with pytest.raises(ConfigurationError, match=r"workspace .* lies in the bucket .* outside it"):
        loaded(tmp_path, text)


@pytest.mark.parametrize(
    ("bucket", "workspace"),
    [("workspace/bucket", "workspace"), ("bucket", "bucket-2"), ("s3://b/p", "w")],
)
def test_a_bucket_in_the_workspace_or_beside_it_is_accepted(
    tmp_path: Path, bucket: str, workspace: str
) -> None:
    assert loaded(tmp_path, f"bucket: {bucket}\nworkspace: {workspace}").bucket


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigurationError, match=r"params\.yaml"):
        load_params(tmp_path / "params.yaml")


# -- the environment ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WATCH__INTERVAL_SECONDS", "abc", ["watch.interval_seconds", "found 'abc'"]),
        ("WATCH", '{"interval_seconds": "abc"}', ["watch.interval_seconds", "found 'abc'"]),
        ("WATCH__INTRVAL", "9", ["'watch.intrval'", "did you mean 'interval_seconds'?"]),
        ("WINDOW__MINIMUM", "20", ["window: minimum 20 exceeds size 8"]),
        ("RETENTION__KEEP", "v3", ["JSON is expected", """such as '["v3"]'""", "found 'v3'"]),
        ("PROMOTION__VETO__COMMAND", "python x.py", ["""such as '["python", "x.py"]'"""]),
        ("WINDOW__BOUNDARIES", "3,4", ["""such as '["3", "4"]'"""]),
        ("WATCH", "60", ["watch: a section"]),
        ("WATCH", "often", ["JSON is expected", "CKPTFUSE_WATCH__KEY"]),
        ("BUCKT", "s3://b", ["no such parameter", "did you mean CKPTFUSE_BUCKET?"]),
        ("GATE_ALPHA", "0.1", ["did you mean CKPTFUSE_GATE__ALPHA?"]),
        ("GAET__ALPHA", "0.1", ["did you mean CKPTFUSE_GATE__ALPHA?"]),
        ("XYZZY__PLUGH", "1", ["no such parameter (CKPTFUSE_KEY and CKPTFUSE_SECTION__KEY"]),
        ("PARMS", "p.yaml", ["did you mean CKPTFUSE_PARAMS?"]),
    ],
)
def test_a_wrong_variable_is_named_and_the_file_is_not_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: list[str]
) -> None:
    monkeypatch.setenv(f"CKPTFUSE_{name}", value)
    with pytest.raises(ConfigurationError) as told:
        loaded(tmp_path)
    message = str(told.value)
    assert message.startswith(f"CKPTFUSE_{name} in the environment: "), message
    assert all(part in message for part in said), message
    assert "params.yaml" not in message


def test_the_file_is_blamed_for_what_a_section_in_the_environment_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTFUSE_WATCH", '{"settle_seconds": 1}')
    message = refusal(tmp_path, "watch: {interval_seconds: abc}")
    assert "CKPTFUSE_WATCH" not in message


def test_a_wrong_environment_is_told_without_a_file_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTFUSE_GATE__ALPHA", "often")
    with pytest.raises(ConfigurationError, match="CKPTFUSE_GATE__ALPHA in the environment"):
        default_params()


def test_an_empty_variable_is_one_that_is_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BUCKET", "RETENTION__LAST", "RETENTION__KEEP", "WATCH__MARKER", "BUCKT"):
        monkeypatch.setenv(f"CKPTFUSE_{name}", "")
    text = "bucket: s3://from/file\nretention: {last: 3, keep: [v1]}\nwatch: {marker: done}"
    params = loaded(tmp_path, text)
    assert (params.bucket, params.watch.marker) == ("s3://from/file", "done")
    assert (params.retention.last, params.retention.keep) == (3, ("v1",))


@pytest.mark.parametrize("name", ["PARAMS", "HOME", "NOTIFY_URL", "VENV"])
def test_variables_of_the_project_that_are_no_parameters_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setenv(f"CKPTFUSE_{name}", "x")
    loaded(tmp_path)
    assert not caplog.messages


@pytest.mark.parametrize(
    "name",
    [
        "PORT",
        "PORT_80_TCP",
        "SERVICE_HOST",
        "WATCH_SERVICE_PORT",
        "MLFLOW_TRACKING_PORT",
        "VERSION",
    ],
)
def test_what_kubernetes_and_images_set_is_warned_of_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setenv(f"CKPTFUSE_{name}", "tcp://10.0.0.1:80")
    loaded(tmp_path)
    loaded(tmp_path)
    (warning,) = caplog.messages
    assert f"CKPTFUSE_{name} in the environment is no parameter" in warning


def test_a_missing_file_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no such file; .*--params or CKPTFUSE_PARAMS"):
        load_params(tmp_path / "absent.yaml")


# -- what the science is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "bucket: /elsewhere",
        "workspace: other",
        "watch: {settle_seconds: 1}",
        "promotion: {minimum_gain: 1}",
        "scoring: {threads: 3}",
        "fuse: {shards: 3}",
        "mlflow: {model: m}",
        "corpus: {domains: {a: {path: /elsewhere/a.parquet, field: content}}}",
    ],
)
def test_operations_and_the_place_of_the_text_are_not_science(tmp_path: Path, text: str) -> None:
    usual = {"corpus": {"domains": {"a": {"path": "a.jsonl"}}}}
    before = loaded(tmp_path, yaml.safe_dump(usual))
    after = loaded(tmp_path, yaml.safe_dump({**usual, **yaml.safe_load(text)}))
    assert after != before
    assert after.scientific_digest() == before.scientific_digest()


@pytest.mark.parametrize(
    "text",
    [
        "trajectory: another",
        "corpus: {salt: x}",
        "corpus: {domains: {a: {path: a.jsonl, weight: 2}}}",
        "corpus: {domains: {a: {path: a.jsonl, tokens: {audit: 5}}}}",
        "scoring: {block_length: 64}",
        "window: {size: 4}",
        "rule: {name: softmax}",
        "rule: {options: {tau: 1}}",
        "fuse: {dtype: float32}",
        "gate: {alpha: 0.01}",
    ],
)
def test_what_decides_weights_bytes_or_verdicts_is_science(tmp_path: Path, text: str) -> None:
    assert loaded(tmp_path, text).scientific_digest() != loaded(tmp_path).scientific_digest()


def test_deployments_need_a_device_that_is_the_same_on_every_machine(tmp_path: Path) -> None:
    told = refusal(tmp_path, "execution: deployments")
    assert "scoring.device must be cuda or cpu" in told
    assert loaded(tmp_path, "{execution: deployments, scoring: {device: cuda}}").scoring.device


@pytest.mark.parametrize(("gpus", "device"), [("", "cpu"), ("0", "cuda")])
def test_auto_and_the_device_that_it_comes_to_are_the_same_science(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: str, device: str
) -> None:
    monkeypatch.setenv(VISIBLE, gpus)
    auto = loaded(tmp_path, "scoring: {device: auto}").scientific_digest()
    found = {d: loaded(tmp_path, f"scoring: {{device: {d}}}").scientific_digest()
             for d in ("cpu", "cuda")}  # fmt: skip
    assert [d for d, digest in found.items() if digest == auto] == [device]


def test_the_models_name_is_the_trajectorys_unless_it_has_its_own(tmp_path: Path) -> None:
    assert loaded(tmp_path, "trajectory: run-7").model_name == "run-7"
    assert loaded(tmp_path, "mlflow: {model: mine}").model_name == "mine"


def test_the_projects_own_file_names_every_knob() -> None:
    """params.yaml in the root promises every knob; a new one must not be forgotten there."""
    written = yaml.safe_load((ROOT / "params.yaml").read_text())
    accepted = Params().model_dump()
    assert written.keys() == accepted.keys()
    for section, values in written.items():
        if isinstance(values, dict):
            assert values.keys() == accepted[section].keys(), section
    assert load_params(ROOT / "params.yaml").trajectory == written["trajectory"]


def test_a_mapping_that_is_merged_twice_is_given_once(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(
        "base: {inner: &b {<<: {x: 1, y: 0}, y: 2}}\nother: {<<: *b, z: 3}\nlast: {<<: *b}\n"
    )
    assert read_file(file) == {
        "base": {"inner": {"x": 1, "y": 2}},
        "other": {"x": 1, "y": 2, "z": 3},
        "last": {"x": 1, "y": 2},
    }
