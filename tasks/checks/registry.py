"""MLflow: does the server answer, is it of a version that works with ours?"""

import os
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten

from packaging.version import Version

from ckptfuse.checks import Check, failed, ok, warning
from ckptfuse.passwords import without_passwords
from ckptfuse.service import Service
from tasks.tracking import tracking_uri

NAME = "MLflow"
#: Older ones have known holes.
SAFE = Version("3.11")
_SQL = ("postgresql", "mysql", "mssql")
_MEND = "correct mlflow.tracking_uri: http(s)://..., a database's URI, or null"


def registry(service: Service) -> Iterator[Check]:
    uri = tracking_uri(service)
    if not uri.startswith(("http://", "https://")):
        yield _without_server(uri)
        return
    # So that a server that is not there is told of in seconds; the user's own wish stands.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    import mlflow
    from mlflow import MlflowClient
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(get_default_host_creds(uri), "/version", "GET")
        MlflowClient(tracking_uri=uri, registry_uri=uri).search_registered_models(max_results=1)
    except Exception as error:  # MLflow's, requests', and what a wrong server makes of them
        yield failed(
            NAME,
            f"{uri}: {type(error).__name__}: {error}",
            "start it (mlflow server), or correct mlflow.tracking_uri; where it asks who we are, "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; for a host name that it "
            "refuses, its --allowed-hosts",
        )
        return
    yield _version(uri, answer.text.strip(), mlflow.__version__)


def _version(uri: str, found: str, ours: str) -> Check:
    server, client = Version(found), Version(ours)
    said = f"{uri} answers; server {server}, client {client}"
    if server.major != client.major:
        return failed(NAME, said, f"run a server of version {client}")
    if server < SAFE:
        return warning(
            NAME, said, f"bring the server to {client}: before {SAFE} it has known holes"
        )
    if server < client:
        return warning(NAME, said, f"bring the server to {client}: clients should not be newer")
    return ok(NAME, said)


def _without_server(uri: str) -> Check:
    if uri.startswith("sqlite:///"):
        return _sqlite(uri)
    if uri.startswith(_SQL):
        return _sql(uri)
    if uri.startswith("file:") or ":" not in uri:
        return _files(uri)
    from mlflow import MlflowClient

    try:
        MlflowClient(tracking_uri=uri, registry_uri=uri).search_registered_models(max_results=1)
    except Exception as error:  # MLflow's, and those of what it opens
        said = without_passwords(f"{uri}: {type(error).__name__}: {error}")
        return failed(NAME, shorten(said, 300), _MEND)
    return ok(NAME, f"{uri} answers")


def _files(uri: str) -> Check:
    """MLflow's old store of files; where it is allowed, asking it would make its folder."""
    from mlflow.environment_variables import MLFLOW_ALLOW_FILE_STORE

    if not MLFLOW_ALLOW_FILE_STORE.get():
        return failed(NAME, f"{uri} is a folder, where MLflow keeps no registry any more", _MEND)
    said = f"{uri} is a folder, which MLflow takes for as long as MLFLOW_ALLOW_FILE_STORE is set"
    return warning(NAME, said, "mlflow migrate-filestore makes a database of it")


def _sql(uri: str) -> Check:
    """Connected to without MLflow, which would make its tables, and tries for minutes."""
    from sqlalchemy import create_engine

    kind = uri.partition(":")[0]
    patience = {} if kind.startswith("mssql") else {"connect_timeout": 15}
    try:
        create_engine(uri, connect_args=patience).connect().close()
    except Exception as error:  # SQLAlchemy's, the driver's, and that there is no driver
        # Not the URI, which has a password; a driver may quote it all the same.
        said = without_passwords(f"{kind}: {type(error).__name__}: {error}")
        mend = "start it, correct mlflow.tracking_uri, or install its driver"
        return failed(NAME, shorten(said, 300), mend)
    return ok(NAME, f"a database without a server ({kind}) answers")


def _sqlite(uri: str) -> Check:
    file = Path(uri.removeprefix("sqlite:///"))
    if file.exists() and not os.access(file, os.W_OK):
        return failed(NAME, f"{file} may not be written", f"give this user the right to {file}")
    return ok(NAME, f"no server is named (mlflow.tracking_uri): the registry is {file}")
