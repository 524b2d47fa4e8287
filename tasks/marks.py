"""What MLflow was last told, remembered in ``cache/``: a look then knows without loading it."""

from ckptfuse.service import Service


def is_marked(service: Service, name: str, state: str) -> bool:
    """Whether ``mark`` was last called with this state."""
    marker = service.workspace.folder("cache") / name
    return marker.is_file() and marker.read_text() == state


def mark(service: Service, name: str, state: str) -> None:
    """Remember that MLflow is as the records say; forgetting it costs another comparison."""
    (service.workspace.folder("cache") / name).write_text(state)
