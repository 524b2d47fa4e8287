"""From a trainer to the service: a checkpoint was written, look now.

    from tasks.notify import checkpoint_written
    checkpoint_written("my-run", uri="s3://bucket/run/step1000")

One small POST with nothing but Python's own library, so that it runs in a trainer's environment. It
means no more than "look now": lost, the schedule looks; doubled, the second look finds nothing.
"""

import datetime
import json
import os
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path

from ckptfuse.errors import CkptfuseError, ConfigurationError
from ckptfuse.passwords import without_passwords

_PATIENCE = 5.0  # seconds: a trainer does not wait


def api_url() -> str:
    """Prefect's server, from PREFECT_API_URL; raises ConfigurationError without it."""
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise ConfigurationError("PREFECT_API_URL names no server to tell")
    return url.rstrip("/")


def resource_of(trajectory: str) -> str:
    """What events are about; in infra/prefect.yaml too."""
    return f"ckptfuse.trajectory.{trajectory}"


def checkpoint_written(trajectory: str, *, uri: str | Path | None = None) -> None:
    """Emit ``checkpoint.written``. Raises CkptfuseError, and nothing else, when that fails."""
    try:
        _post(_event(trajectory, uri))
    except CkptfuseError:
        raise
    except Exception as error:  # the network's, HTTP's, and what a wrong address makes of them
        said = (
            f"{api_url()} was not told of the checkpoint ({type(error).__name__}: {error}); is "
            "PREFECT_API_URL the address of Prefect's server?"
        )
        raise CkptfuseError(without_passwords(said)) from None


def _event(trajectory: str, uri: str | Path | None) -> dict[str, object]:
    return {
        "id": str(uuid.uuid4()),
        "occurred": datetime.datetime.now(datetime.UTC).isoformat(),
        "event": "checkpoint.written",
        "resource": {
            "prefect.resource.id": resource_of(trajectory),
            "prefect.resource.name": trajectory,
        },
        "payload": {"uri": None if uri is None else str(uri)},
    }


def _post(event: Mapping[str, object]) -> None:
    request = urllib.request.Request(  # noqa: S310 - the team's own server
        f"{api_url()}/events",
        data=json.dumps([event]).encode(),
        headers={"Content-Type": "application/json", **_authorization()},
    )
    urllib.request.urlopen(request, timeout=_PATIENCE).close()  # noqa: S310


def _authorization() -> dict[str, str]:
    """As Prefect's own client: a server behind a password has it in PREFECT_API_AUTH_STRING."""
    import base64

    secret = os.environ.get("PREFECT_API_AUTH_STRING")
    if not secret:
        return {}
    return {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}
