"""The report page: one HTML file without outside parts, written from the records."""

from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ckptfuse.errors import RecordError
from ckptfuse.evaluation import evaluate
from ckptfuse.losses import Estimate
from ckptfuse.notes import ENERGY, explain
from ckptfuse.overview import Overview, overview, steps_saved
from ckptfuse.phases import phase_notes
from ckptfuse.present import left_by
from ckptfuse.records import PlanRecord
from ckptfuse.report import figures
from ckptfuse.service import Service


def write_report(service: Service) -> Path:
    """Write ``report/index.html`` in the workspace; returns its path."""
    folder = service.workspace.folder("report")
    path = folder / "index.html"
    path.write_text(render(service))
    return path


def render(service: Service) -> str:
    """The page's HTML."""
    seen = overview(service)
    environment = Environment(loader=PackageLoader("ckptfuse.report", "templates"), autoescape=True)
    return environment.get_template("page.html.j2").render(
        trajectory=service.params.trajectory,
        rule=service.params.rule.name,
        seen=seen,
        phases=phase_notes(seen.rows),
        left=left_by(seen.look),
        explained=[(row.step, explain(row.plan)) for row in seen.rows if row.plan is not None],
        saved=steps_saved(seen.rows),
        drawings=_drawings(service, seen),
    )


def _drawings(service: Service, seen: Overview) -> list[tuple[str, Markup]]:
    """Titled figures, those that there is something to draw for."""
    drawn = [("Loss on report text", figures.losses(seen))]
    plans = [row.plan for row in seen.rows if row.plan is not None]
    if plans:
        drawn.append(("Weights", figures.weights(seen)))
    if any(ENERGY in plan.notes for plan in plans):
        drawn.append(("Noise energy: what averaging can win", figures.noise_energy(seen)))
    if any(merge.predicted is not None for plan in plans for merge in plan.merges):
        drawn.append(("Predicted and measured loss of merges", figures.predictions(seen)))
    champion = next((plan for plan in plans if _is_champion(plan.fusion, seen)), None)
    if champion is not None and (gains := _gains(service, champion)):
        title = f"Champion of step {champion.step} by domain"
        drawn.append((title, figures.domain_gains(gains)))
    return [(title, Markup(svg)) for title, svg in drawn]


def _gains(service: Service, champion: PlanRecord) -> dict[str, Estimate] | None:
    """Over the newest of its window; None where the text has changed since it was scored."""
    try:
        return evaluate(service, champion).domain_gains("newest")
    except RecordError:
        return None


def _is_champion(fusion: str, seen: Overview) -> bool:
    return seen.champion is not None and seen.champion.fusion == fusion
