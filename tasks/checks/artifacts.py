"""Where MLflow's artifacts go, past its server: can they be written with what is installed?"""

from collections.abc import Iterator
from textwrap import shorten

from ckptfuse.checks import Check, failed, warning
from ckptfuse.checks.probe import written
from ckptfuse.passwords import without_passwords
from ckptfuse.service import Service
from tasks.tracking import tracking_uri

NAME = "MLflow artifacts"
_TRIED = ("s3://", "file://")


def artifacts(service: Service) -> Iterator[Check]:
    """None where the server says where they go."""
    root = service.params.mlflow.artifact_root
    if root is None:
        return
    if "://" not in root or root.startswith(_TRIED):
        mend = "correct mlflow.artifact_root, or give this user the right to write there"
        yield written(NAME, root, mend)
    else:
        yield _known_to_mlflow(root, tracking_uri(service))


def _known_to_mlflow(root: str, tracking: str) -> Check:
    """MLflow loads what a kind of store needs when it is first opened."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        get_artifact_repository(root, tracking_uri=tracking)
    except Exception as error:  # MLflow's, and whatever the store's own package raises
        # Before it is cut: of an address that is cut within its password nobody would know.
        said = shorten(without_passwords(f"{root}: {type(error).__name__}: {error}"), 300)
        mend = "correct mlflow.artifact_root, or install the package that MLflow needs for it"
        return failed(NAME, said, mend)
    said = f"{root} is of a kind that MLflow opens; writing there is not tried here"
    return warning(NAME, said, "see whether the first fusion's artifacts arrive there")
