"""What MLflow draws: losses by training step, per domain and for all, and the report's figures.

On report text, what people quote, metrics have bare names (``loss.fusion.python``); those on
selection and audit text stand apart under ``selection/`` and ``audit/``.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from ckptfuse.corpus import SPLITS, Split
from ckptfuse.evaluation import evaluate
from ckptfuse.gate import best_member
from ckptfuse.losses import combine, perplexity
from ckptfuse.notes import ENERGY, SHARE, domain_energies
from ckptfuse.overview import Overview, overview, steps_saved
from ckptfuse.records import CheckpointRecord, GateRecord, PlanRecord
from ckptfuse.service import Service, plans_of
from ckptfuse.window import tokens_of
from tasks.datasets import log_corpus
from tasks.registry import Registry

_BATCH = 1000

#: A metric's name, its value, the training step, and when its checkpoint was written (s).
Point = tuple[str, float, int, float]
#: Metric -> where MLflow has it: the training step, and when its checkpoint was written (ms). A
#: trainer that went back writes a step again.
Logged = dict[str, set[tuple[int, int]]]


def draw_curves(registry: Registry) -> None:
    """Log what is in the records and not yet in MLflow; the figures anew."""
    from mlflow.entities import Metric

    from ckptfuse.report import figures

    run = registry.curves_run()
    log_corpus(registry, run)
    seen = overview(registry.service)
    logged = _logged(registry, run)
    fresh = [
        Metric(name, value, _milliseconds(modified), step)
        for name, value, step, modified in _points(registry.service, seen, logged)
        if math.isfinite(value) and (step, _milliseconds(modified)) not in logged.get(name, ())
    ]
    for start in range(0, len(fresh), _BATCH):
        registry.client.log_batch(run, metrics=fresh[start : start + _BATCH])
    for metric in fresh:
        logged.setdefault(metric.key, set()).add((metric.step, metric.timestamp))
    _remember(registry, run, logged)
    registry.client.log_text(run, figures.losses(seen), "figures/losses.svg")
    if any(row.plan is not None for row in seen.rows):
        registry.client.log_text(run, figures.weights(seen), "figures/weights.svg")


def _logged(registry: Registry, run: str) -> Logged:
    """What the run has: as remembered in ``cache/``, or asked of MLflow metric by metric.

    Its newest values tell whether it has what is remembered: MLflow may have been restored from a
    backup, which has fewer.
    """
    client = registry.client
    newest = client.get_run(run).data.metrics
    try:
        remembered = json.loads(_memory(registry).read_text())
        if remembered["run"] == run and remembered["newest"] == newest:
            places = remembered["logged"].items()
            return {name: {(step, at) for step, at in found} for name, found in places}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass  # nothing there, or cut off by a kill
    return {
        name: {(one.step, one.timestamp) for one in client.get_metric_history(run, name)}
        for name in newest
    }


def _remember(registry: Registry, run: str, logged: Logged) -> None:
    places = {name: sorted(found) for name, found in logged.items()}
    newest = registry.client.get_run(run).data.metrics
    remembered = {"run": run, "newest": newest, "logged": places}
    _memory(registry).write_text(json.dumps(remembered))


def _memory(registry: Registry) -> Path:
    return registry.service.workspace.folder("cache") / "curves.json"


def _points(service: Service, seen: Overview, logged: Logged) -> Iterator[Point]:
    written = {}
    for checkpoint in service.checkpoints().values():
        written[checkpoint.fingerprint] = checkpoint.modified
        point = (checkpoint.step, checkpoint.modified)
        yield from _losses(
            service, "raw", checkpoint.fingerprint, checkpoint.tokenizer, point, logged
        )
        tokens = tokens_of(checkpoint, service.params.window)
        if tokens is not None:
            yield ("tokens", tokens, *point)
    for plan in plans_of(service).values():
        point = (plan.step, written.get(plan.ancillary, 0.0))
        best = best_member(plan.members).fingerprint
        yield from _losses(service, "best_single", best, plan.tokenizer, point, logged)
        yield from _losses(service, "fusion", plan.fusion, plan.tokenizer, point, logged)
        for note in (ENERGY, SHARE):
            if note in plan.notes:
                yield (note, plan.notes[note], *point)
        for domain, energy in domain_energies(plan.notes).items():
            yield (f"{ENERGY}.{domain}", energy, *point)
    for row, steps in zip(seen.rows, steps_saved(seen.rows), strict=True):
        if steps is not None and row.plan is not None:
            yield ("steps_saved", steps, row.step, written.get(row.plan.ancillary, 0.0))


def _losses(
    service: Service,
    name: str,
    model_id: str,
    tokenizer: str,
    point: tuple[int, float],
    logged: Logged,
) -> Iterator[Point]:
    """Loss (nats per token) and perplexity on each split, of each domain and of the target.

    The target's loss comes last: where MLflow has that, it has all of the split, and nothing is
    read.
    """
    for split in SPLITS:
        step, modified = point
        if (step, _milliseconds(modified)) in logged.get(f"{_prefix(split)}loss.{name}", ()):
            continue
        by_domain = service.scorer.by_domain(model_id, tokenizer, split)
        if not by_domain:
            continue
        target = combine(by_domain, service.scorer.target_weights).mean
        losses = {f"{name}.{d}": found.mean for d, found in by_domain.items()} | {name: target}
        for metric, loss in losses.items():
            if (found := perplexity(loss)) is not None:
                yield (f"{_prefix(split)}perplexity.{metric}", found, *point)
            yield (f"{_prefix(split)}loss.{metric}", loss, *point)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _prefix(split: Split) -> str:
    return "" if split == "report" else f"{split}/"


def describe_fusion(registry: Registry, run: str, decided: PlanRecord, verdict: GateRecord) -> None:
    """A fusion's run: the corpus, figures on report text, weights by their checkpoints' steps."""
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
    tokens = dict(_tokens(registry.service, decided))
    metrics += [Metric("tokens", known, 0, step) for step, known in tokens.items()]
    registry.client.log_batch(
        run, metrics=metrics, params=[Param(key, value) for key, value in params.items()]
    )
    registry.client.log_text(run, domain_gains(gains), "figures/gain_by_domain.svg")
    log_corpus(registry, run)


def _tokens(service: Service, decided: PlanRecord) -> Iterator[tuple[int, float]]:
    """Step and tokens of each checkpoint of a window, where they are known."""
    for member in decided.members:
        record = service.records.get(CheckpointRecord, member.signature)
        tokens = None if record is None else tokens_of(record, service.params.window)
        if tokens is not None:
            yield member.step, tokens
