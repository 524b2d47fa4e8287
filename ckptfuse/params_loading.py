"""Parameters from params.yaml and the environment, with paths that hold wherever one stands."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ckptfuse.errors import ConfigurationError
from ckptfuse.params import PARAMS_FILE, Params
from ckptfuse.params_environment import check_variables
from ckptfuse.params_file import read_file
from ckptfuse.params_problems import explain
from ckptfuse.store import is_s3, local_path


def load_params(path: Path | None = None) -> Params:
    """Read params.yaml and the environment; relative paths are taken from the file's folder.

    Raises ConfigurationError naming the key, what was found and what would be accepted.
    """
    file = path or Path(os.environ.get("CKPTFUSE_PARAMS", PARAMS_FILE))
    if not file.is_file():
        raise ConfigurationError(
            f"{file}: no such file; run from a folder with a {PARAMS_FILE}, or name one with "
            "--params or CKPTFUSE_PARAMS"
        )
    params = _anchor(_params_of(read_file(file), str(file)), file.resolve().parent)
    keep_apart(params)
    return params


def default_params() -> Params:
    """What there is without a file. Raises ConfigurationError for a wrong environment."""
    return _params_of({}, "the defaults")


def _params_of(values: Mapping[str, Any], where: str) -> Params:
    check_variables(Params)
    try:
        return Params(**values)
    except ValidationError as error:
        raise ConfigurationError(explain(where, error, Params)) from error
    except ValueError as error:  # of pydantic-settings
        raise ConfigurationError(f"{where}: {error}") from error


def keep_apart(params: Params) -> None:
    """Raise ConfigurationError for a workspace in the bucket, which is the trainer's alone.

    A bucket in the workspace does no harm: the demo's lies there.
    """
    if not params.bucket or is_s3(params.bucket):
        return
    bucket = local_path(params.bucket)
    ours, trainers = (Path(os.path.realpath(path)) for path in (params.workspace, bucket))
    if ours.is_relative_to(trainers):
        raise ConfigurationError(
            f"workspace {ours} lies in the bucket {trainers}, which is only ever read; set "
            "`workspace` in params.yaml or CKPTFUSE_WORKSPACE to a folder outside it"
        )


def _anchor(params: Params, folder: Path) -> Params:
    def absolute(uri: str | None) -> str | None:
        return uri if uri is None or "://" in uri else str(folder / uri)

    domains = {
        name: domain.model_copy(update={"path": absolute(domain.path)})
        for name, domain in params.corpus.domains.items()
    }
    corpus = {"domains": domains, "tokenizer": absolute(params.corpus.tokenizer)}
    remote = params.ledger.remote
    if remote is not None and ":" not in remote.partition("/")[0]:  # not git@host:path either
        remote = absolute(remote)
    return params.model_copy(
        update={
            "corpus": params.corpus.model_copy(update=corpus),
            "scoring": params.scoring.model_copy(update={"model": absolute(params.scoring.model)}),
            "bucket": absolute(params.bucket),
            "mlflow": params.mlflow.model_copy(
                update={"artifact_root": absolute(params.mlflow.artifact_root)}
            ),
            "ledger": params.ledger.model_copy(
                update={"remote": remote, "dvc_remote": absolute(params.ledger.dvc_remote)}
            ),
            "workspace": absolute(params.workspace),
        }
    )
