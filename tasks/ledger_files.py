"""The files of a ledger that stages make: their names, and how two of them are written."""

import csv
import json
import math
from pathlib import Path

from ckptfuse.evaluation import Evaluation, evaluate
from ckptfuse.records import GateRecord, PlanRecord
from ckptfuse.service import Service, losses_of, target_loss

SCORES = Path("scores")
DECISION = Path("decision.json")
MODEL = Path("model")
METRICS = Path("metrics.json")
LOSSES = Path("losses.csv")


def write_decision(decided: PlanRecord, folder: Path) -> None:
    weights = {f"step{member.step}": member.weight for member in decided.members}
    text = json.dumps({"fusion": decided.fusion, "weights": weights}, indent=2)
    (folder / DECISION).unlink(missing_ok=True)  # it may be a read-only link into the cache
    (folder / DECISION).write_text(text + "\n")


def write_metrics(
    service: Service, decided: PlanRecord, verdict: GateRecord, folder: Path
) -> Evaluation:
    figures = evaluate(service, decided)
    comparisons: dict[str, object] = {
        c.against: {"gain": c.gain, "standard_error": c.standard_error, "lower": c.lower_bound}
        for c in verdict.comparisons
    }
    values: dict[str, object] = {
        **figures.metrics(),
        "gate": {"passed": verdict.verdict == "publish", **comparisons},
    }
    (folder / METRICS).write_text(json.dumps(_rounded(values), indent=2) + "\n")
    with (folder / LOSSES).open("w", newline="") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["step", "model", "loss"])
        for member in decided.members:
            losses = losses_of(service, member.fingerprint, decided.tokenizer, "report")
            rows.writerow([member.step, "checkpoint", f"{target_loss(service, losses):.6f}"])
        rows.writerow([decided.step, "fusion", f"{figures.target('fusion').mean:.6f}"])
    return figures


def _rounded(value: object) -> object:
    """Six decimals: beyond them losses depend on the machine."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
