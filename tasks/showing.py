"""What Prefect's pages show beside the log: names of runs, progress, the table of fusions."""

import re
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from ckptfuse.overview import Row, overview
from ckptfuse.service import Service

_NEWEST = 50  # rows of the table


class Progress:
    """A progress artifact of the present run, updated when there is something new to show."""

    def __init__(self, description: str) -> None:
        created = create_progress_artifact(progress=0.0, description=description)
        self._id: UUID = created  # type: ignore[assignment]
        self._shown = 0.0

    def update(self, share: float) -> None:
        if share != self._shown:
            update_progress_artifact(artifact_id=self._id, progress=100 * share)
            self._shown = share


def name_run(name: str) -> None:
    """What the present flow run turned out to be; it was started before anyone knew."""
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        with get_client(sync_client=True) as client:
            client.update_flow_run(context.flow_run.id, name=name)


def show_fusions(service: Service) -> None:
    """The table that ``ckptfuse status`` prints, as an artifact, and where the page is."""
    trajectory = service.params.trajectory
    rows = overview(service).rows[-_NEWEST:]
    lines = [
        f"## {trajectory}: loss on report text, nats per token",
        "",
        "| step | raw | best single | merged | gain | verdict | reason |",
        "|---:|---:|---:|---:|---:|---|---|",
        *(_line(row) for row in reversed(rows)),
        "",
        f"The page with figures: `ckptfuse report` writes `{_page(service)}`.",
    ]
    # A key is small letters, digits and dashes.
    key = re.sub("[^a-z0-9]+", "-", f"fusions-{trajectory.lower()}").strip("-")
    create_markdown_artifact("\n".join(lines), key=key, description=f"Fusions of {trajectory}")


def _line(row: Row) -> str:
    losses = (row.loss, row.best_single, row.fused)
    numbers = ["" if value is None else f"{value:.4f}" for value in losses]
    gain = "" if row.gain is None else f"{row.gain:+.4f}"
    reason = row.reason.replace("|", "\\|")
    return f"| {row.step} | {' | '.join(numbers)} | {gain} | {row.verdict} | {reason} |"


def _page(service: Service) -> str:
    return str(service.workspace.root.resolve() / "report" / "index.html")
