"""What MLflow draws: losses by training step, per domain and for all, and the report's figures."""

import math
from collections.abc import Iterator

from ckptfuse.evaluation import evaluate
from ckptfuse.gate import best_member
from ckptfuse.losses import combine
from ckptfuse.notes import ENERGY, domain_energies
from ckptfuse.overview import Overview, overview, steps_saved
from ckptfuse.records import CheckpointRecord, GateRecord, PlanRecord
from ckptfuse.service import Service, plans_of
from tasks.registry import Registry

_BATCH = 1000

#: A metric's name, its value, the training step, and when its checkpoint was written (s).
Point = tuple[str, float, int, float]


def draw_curves(registry: Registry) -> None:
    """Log what is in the records and not yet in MLflow; the figures anew."""
    from mlflow.entities import Metric

    from ckptfuse.report import figures

    run = registry.curves_run()
    seen = overview(registry.service)
    wanted = list(_points(registry.service, seen))
    logged = {
        (name, metric.step)
        for name in {name for name, *_ in wanted}
        for metric in registry.client.get_metric_history(run, name)
    }
    fresh = [
        Metric(name, value, round(modified * 1000), step)
        for name, value, step, modified in wanted
        if (name, step) not in logged and math.isfinite(value)
    ]
    for start in range(0, len(fresh), _BATCH):
        registry.client.log_batch(run, metrics=fresh[start : start + _BATCH])
    registry.client.log_text(run, figures.losses(seen), "figures/losses.svg")
    if any(row.plan is not None for row in seen.rows):
        registry.client.log_text(run, figures.weights(seen), "figures/weights.svg")


def _points(service: Service, seen: Overview) -> Iterator[Point]:
    written = {}
    for checkpoint in service.records.all(CheckpointRecord).values():
        written[checkpoint.fingerprint] = checkpoint.modified
        point = (checkpoint.step, checkpoint.modified)
        yield from _losses(service, "raw", checkpoint.fingerprint, checkpoint.tokenizer, point)
    for plan in plans_of(service).values():
        point = (plan.step, written.get(plan.ancillary, 0.0))
        best = best_member(plan.members).fingerprint
        yield from _losses(service, "best_single", best, plan.tokenizer, point)
        yield from _losses(service, "fusion", plan.fusion, plan.tokenizer, point)
        if ENERGY in plan.notes:
            yield (ENERGY, plan.notes[ENERGY], *point)
        for domain, energy in domain_energies(plan.notes).items():
            yield (f"{ENERGY}.{domain}", energy, *point)
    for row in seen.rows:
        saved = steps_saved(seen.rows, row)
        if saved is not None and row.plan is not None:
            yield ("steps_saved", saved, row.step, written.get(row.plan.ancillary, 0.0))


def _losses(
    service: Service, name: str, model_id: str, tokenizer: str, point: tuple[int, float]
) -> Iterator[Point]:
    """Loss (nats per token) and perplexity on report text, of each domain and of the target."""
    by_domain = service.scorer.by_domain(model_id, tokenizer, "report")
    if not by_domain:
        return
    loss = combine(by_domain, service.scorer.target_weights).mean
    yield (f"loss.{name}", loss, *point)
    yield (f"perplexity.{name}", math.exp(loss), *point)
    for domain, estimate in by_domain.items():
        yield (f"loss.{name}.{domain}", estimate.mean, *point)


def describe_fusion(registry: Registry, run: str, decided: PlanRecord, verdict: GateRecord) -> None:
    """A fusion's run: its figures on report text, and its weights by their checkpoints' steps."""
    from mlflow.entities import Metric, Param

    from ckptfuse.report.figures import domain_gains

    measured = evaluate(registry.service, decided)
    gains = measured.domain_gains("newest")
    values = {
        **decided.notes,
        "loss.fusion": measured.target("fusion").mean,
        "loss.best_single": measured.target("best").mean,
        "loss.newest": measured.target("newest").mean,
        "gain.best_single": measured.gain("best").mean,
        "gain.newest": measured.gain("newest").mean,
        **{f"gain.newest.{name}": gain.mean for name, gain in gains.items()},
    }
    params = {
        "rule": decided.rule,
        "window": ", ".join(str(member.step) for member in decided.members),
        "weights": ", ".join(f"{member.weight:.4f}" for member in decided.members),
        "gate": verdict.verdict,
    }
    metrics = [Metric(k, v, 0, decided.step) for k, v in values.items() if math.isfinite(v)]
    metrics += [Metric("weight", member.weight, 0, member.step) for member in decided.members]
    registry.client.log_batch(
        run, metrics=metrics, params=[Param(key, value) for key, value in params.items()]
    )
    registry.client.log_text(run, domain_gains(gains), "figures/gain_by_domain.svg")
