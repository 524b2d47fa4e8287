"""Where packaged models lie in an artifact store."""

from pathlib import Path

import pytest
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from tasks.artifacts import local_folder, store
from tasks.packaging import MODEL_FOLDER


@pytest.mark.parametrize("name", ["plain", "my run", "50% off", "a%20b", "Läufe #2?"])
def test_a_model_is_stored_where_mlflow_looks_for_it(tmp_path: Path, name: str) -> None:
    packaged, place = tmp_path / "packaged", tmp_path / name / "artifacts"
    (packaged / MODEL_FOLDER).mkdir(parents=True)
    (packaged / MODEL_FOLDER / "model.safetensors").write_bytes(b"weights")
    store(place.as_uri(), packaged)
    assert (place / MODEL_FOLDER / "model.safetensors").read_bytes() == b"weights"
    listed = get_artifact_repository(place.as_uri()).list_artifacts(MODEL_FOLDER)
    assert [(file.path, file.file_size) for file in listed] == [
        (f"{MODEL_FOLDER}/model.safetensors", 7)
    ]
    assert local_folder(place.as_uri()) == place


def test_a_location_in_s3_is_no_folder() -> None:
    assert local_folder("s3://registry/a b") is None
