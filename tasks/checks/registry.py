"""MLflow: does the server answer, is it of a version that works with ours?"""

import os
from collections.abc import Iterator
from pathlib import Path

from packaging.version import Version

from ckptfuse.checks import Check, failed, ok, warning
from ckptfuse.service import Service
from tasks.tracking import tracking_uri

NAME = "MLflow"
#: Older ones have known holes.
SAFE = Version("3.11")


def registry(service: Service) -> Iterator[Check]:
    uri = tracking_uri(service)
    if not uri.startswith(("http://", "https://")):
        yield _database(uri)
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


def _database(uri: str) -> Check:
    if not uri.startswith("sqlite:///"):
        return ok(NAME, f"a database without a server ({uri.partition(':')[0]})")
    file = Path(uri.removeprefix("sqlite:///"))
    if file.exists() and not os.access(file, os.W_OK):
        return failed(NAME, f"{file} may not be written", f"give this user the right to {file}")
    return ok(NAME, f"no server is named (mlflow.tracking_uri): the registry is {file}")
