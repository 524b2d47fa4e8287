"""The tracking server: which one it is, and whether it answers."""

import os

from ckptfuse.errors import PublicationError
from ckptfuse.passwords import without_passwords
from ckptfuse.service import Service

#: Read before MLflow is told a URI: it then overwrites the variable, for a next service too.
_GIVEN_URI = os.environ.get("MLFLOW_TRACKING_URI")
#: Seconds that a server may take to say anything at all.
PATIENCE = 15


def tracking_uri(service: Service) -> str:
    """The tracking server, or a sqlite file in the workspace."""
    given = service.params.mlflow.tracking_uri or _GIVEN_URI
    return given or f"sqlite:///{service.workspace.root.resolve()}/mlflow.db"


def require_answer(uri: str) -> None:
    """Raise PublicationError when a server is down, before anything waits for it for long.

    MLflow's client tries each request again for minutes, and a look makes many; the next look
    comes anyway. Whatever a server says, it answers.
    """
    if not uri.startswith(("http://", "https://")):
        return
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        http_request(
            get_default_host_creds(uri),
            "/health",
            "GET",
            max_retries=0,
            timeout=PATIENCE,
            raise_on_status=False,
        )
    except Exception as error:
        said = without_passwords(f"the tracking server at {uri} does not answer: {error}")
        raise PublicationError(said) from None  # which has the address in full
