"""What consumers do with a published version: serve it, call it, load it. No pickle is in it."""

import json
import os
import pickletools
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.models import Model
from safetensors import safe_open

from infra.native.postgres import free_port
from tasks.artifacts import local_folder
from tasks.packaging import EXAMPLE
from tests.conftest import BINARIES, Project, environment

CHAMPION = "models:/trial@champion"


@pytest.fixture
def registry(finished: Project) -> Project:
    """The finished project, with MLflow in this process pointed to its registry."""
    mlflow.set_tracking_uri(finished.mlflow_uri)
    mlflow.set_registry_uri(finished.mlflow_uri)
    return finished


def packaged(registry: Project, version: str) -> Path:
    """Where a version's files lie."""
    found = mlflow.MlflowClient().get_model_version("trial", version)
    model = mlflow.MlflowClient().get_logged_model(str(found.source).removeprefix("models:/"))
    folder = local_folder(str(model.artifact_location))
    assert folder is not None
    return folder


@contextmanager
def served(registry: Project) -> Iterator[str]:
    """The champion behind `mlflow models serve`, in a process of its own."""
    port = free_port()
    command = [
        str(BINARIES / "mlflow"), "models", "serve", "--model-uri", CHAMPION,
        "--host", "127.0.0.1", "--port", str(port), "--env-manager", "local",
    ]  # fmt: skip
    address = {"MLFLOW_TRACKING_URI": registry.mlflow_uri}
    server = subprocess.Popen(
        command,
        env=environment() | address,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            assert server.poll() is None, "it ended at once"
            try:
                urllib.request.urlopen(f"{url}/ping", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def post(url: str, body: bytes) -> Any:
    request = urllib.request.Request(
        f"{url}/invocations", data=body, headers={"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=60).read())["predictions"]


def test_a_served_champion_answers_prompts(registry: Project) -> None:
    example = packaged(registry, registry.aliases()["champion"]) / "serving_input_example.json"
    with served(registry) as url:
        asked = {"inputs": ["import os", "def f("], "params": {"max_new_tokens": 4}}
        first, second = post(url, json.dumps(asked).encode())
        (of_example,) = post(url, example.read_bytes())
    assert first.startswith("import os")
    assert second.startswith("def f(")
    assert len(first + second) > len("import osdef f(")
    assert of_example.startswith(EXAMPLE[0][0])


def test_a_version_answers_as_a_python_function_as_its_signature_says(registry: Project) -> None:
    model = mlflow.pyfunc.load_model(CHAMPION)
    assert model.metadata.signature.inputs.to_dict() == [{"type": "string", "required": True}]
    settings = {param.name: param.default for param in model.metadata.signature.params}
    assert settings == {"max_new_tokens": 64, "do_sample": False, "temperature": 1.0}
    prompts, chosen = EXAMPLE
    (short,) = model.predict(prompts, params=chosen)
    (longer,) = model.predict(prompts)
    assert short.startswith(prompts[0])
    assert longer.startswith(short)
    assert len(longer) > len(short)


def test_the_weight_folder_of_a_version_loads_with_transformers_alone(registry: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pipeline = mlflow.transformers.load_model(CHAMPION)
    folder = packaged(registry, registry.aliases()["champion"]) / "model"
    model, about = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(about[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = AutoTokenizer.from_pretrained(folder)("import os", return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=4, do_sample=False)
    same = pipeline("import os", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert AutoTokenizer.from_pretrained(folder).decode(answer[0], skip_special_tokens=True) == same


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_version_has_an_example_and_no_pickle(registry: Project, version: str) -> None:
    folder = packaged(registry, version)
    described = Model.load(str(folder))
    assert described.load_input_example(str(folder)) == EXAMPLE[0]
    assert described.load_input_example_params(str(folder)) == EXAMPLE[1]
    assert described.flavors.keys() == {"transformers", "python_function"}
    loader = described.flavors["python_function"]
    assert loader["loader_module"] == "mlflow.transformers"
    assert not {"python_model", "cloudpickle_version", "serialization_format"} & loader.keys()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert is_tensors(path) if path.suffix == ".safetensors" else is_text(path), path


def is_tensors(path: Path) -> bool:
    with safe_open(path, framework="np") as file:
        return len(list(file.keys())) > 0


def is_text(path: Path) -> bool:
    """Text that is no pickle: neither a binary one nor one of the oldest, which are ASCII."""
    data = path.read_bytes()
    data.decode("utf-8")  # a zip, as torch writes them, and a pickle of protocol 2 or later are not
    try:
        list(pickletools.genops(data))
    except Exception:  # whatever its reader trips over
        return True
    return False


def test_what_is_no_text_is_told_from_it(tmp_path: Path) -> None:
    import pickle

    import torch

    torch.save({"weight": torch.zeros(2)}, tmp_path / "zip")
    (tmp_path / "new").write_bytes(pickle.dumps({"weight": 1}))
    (tmp_path / "old").write_bytes(pickle.dumps({"weight": 1}, protocol=0))
    for name in ("zip", "new", "old"):
        try:
            found = is_text(tmp_path / name)
        except UnicodeDecodeError:
            found = False
        assert not found, name
