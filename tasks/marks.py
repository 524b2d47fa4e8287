"""What MLflow was last told, remembered in ``cache/``: a look then knows without loading it."""

from ckptfuse.digests import digest
from ckptfuse.service import Service
from tasks.tracking import tracking_uri


def is_marked(service: Service, name: str, state: str) -> bool:
    """Whether ``mark`` was last called with this state, for the same tracking server."""
    marker = service.workspace.folder("cache") / name
    return marker.is_file() and marker.read_text() == _told(service, state)


def mark(service: Service, name: str, state: str) -> None:
    """Remember that MLflow is as the records say; forgetting it costs another comparison."""
    (service.workspace.folder("cache") / name).write_text(_told(service, state))


def _told(service: Service, state: str) -> str:
    return digest([tracking_uri(service), state])
