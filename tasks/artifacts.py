"""Packaged models in the artifact store: hard links where it is a folder, elsewhere one upload.

Into S3 MLflow uploads with boto3's transfer manager, straight from here: a large file goes in
parts, as large as it takes for 10,000 of them to be enough, so up to S3's own limit of an object.
"""

from pathlib import Path

from ckptfuse.store import link_tree
from tasks.log import log
from tasks.packaging import MODEL_FOLDER, is_weights


def store(location: str, packaged: Path) -> None:
    """Bring a packaged model to its place in the artifact store."""
    folder = local_folder(location)
    if folder is not None:
        link_tree(packaged, folder)
    else:
        _upload(location, packaged)


def local_folder(location: str) -> Path | None:
    """The folder that an artifact location names; None when it is no folder of this machine.

    As MLflow finds it there: a space in the path is %20 in the location.
    """
    from mlflow.utils.file_utils import local_file_uri_to_path

    is_local = location.startswith(("file:", "/"))
    return Path(local_file_uri_to_path(location)) if is_local else None


def weight_sizes(location: str) -> dict[str, int]:
    """File -> size (bytes) in the weights' folder of a packaged model."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    listed = get_artifact_repository(location).list_artifacts(MODEL_FOLDER)
    return {str(f.path).removeprefix(f"{MODEL_FOLDER}/"): f.file_size for f in listed}


def _upload(location: str, packaged: Path) -> None:
    """Weights that an upload before this one has brought, when it was broken off, stay."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository, there = get_artifact_repository(location), weight_sizes(location)
    for path in sorted(path for path in packaged.rglob("*") if path.is_file()):
        folder, size = path.relative_to(packaged).parent.as_posix(), path.stat().st_size
        if is_weights(path) and there.get(path.name) == size:
            continue
        repository.log_artifact(str(path), None if folder == "." else folder)
        if is_weights(path):
            log.info("uploaded %s (%.1f MB)", path.name, size / 1e6)
