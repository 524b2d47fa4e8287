"""What Prometheus is told, from a workspace with no server beside it."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ckptfuse.looks import Look, LookFile, Pending, Queued
from ckptfuse.metrics import prometheus_registry
from ckptfuse.records import (
    FusionRecord,
    GateRecord,
    PromotionRecord,
    PublicationRecord,
    QuarantineRecord,
)
from ckptfuse.service import Service
from tests.helpers import checkpoint_record, make_service, member, plan_record, record_losses


def told(service: Service) -> dict[str, float]:
    """``name{label}`` -> value, as a scrape reads it."""
    from prometheus_client import generate_latest

    found = {}
    for family in text_string_to_metric_families(
        generate_latest(prometheus_registry(service)).decode()
    ):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("trajectory") == service.params.trajectory
            more = ",".join(labels.values())
            found[sample.name.removeprefix("ckptfuse_") + (f"{{{more}}}" if more else "")] = (
                sample.value
            )
    return found


def looked(service: Service, **changes: object) -> None:
    """As if the service had looked with its own corpus and numerics."""
    look = Look.model_validate(
        {"begun": 5000.0, "ended": 5030.0, "corpus": service.scorer.corpus_digest(),
         "numerics": service.scorer.numerics, **changes}
    )  # fmt: skip
    cache = service.workspace.folder("cache")
    (cache / "look.json").write_text(look.model_dump_json())
    assert LookFile(cache).last() == look


def judged(service: Service, step: int, verdict: str) -> None:
    gate = GateRecord.model_validate(
        {"window": f"window-{step}", "fusion": f"fusion-{step}", "step": step, "verdict": verdict,
         "reason": "because", "test": 1, "alpha": 0.025, "comparisons": []}
    )  # fmt: skip
    service.records.put(f"gate-{step}", gate)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """Checkpoints every 100 s; the fusion of step 300 is champion, the two after it declined."""
    service = make_service(tmp_path)
    for step, loss in ((100, 3.0), (200, 2.8), (300, 2.9), (400, 2.7), (500, 2.6)):
        record = checkpoint_record(step, tokenizer="tokenizer", fingerprint=f"fingerprint-{step}")
        service.records.put(f"s{step}", record)
        record_losses(service, record.fingerprint, np.full(6, 10 * loss))
    for step, loss, verdict in ((300, 2.5, "publish"), (400, 2.75, "declined")):
        members = [member(100, 3.0, 0.0), member(200, 2.8), member(300, 2.9)]
        service.records.put(f"window-{step}", plan_record(step, members))
        record_losses(service, f"fusion-{step}", np.full(6, 10 * loss))
        fusion = FusionRecord(fusion=f"fusion-{step}", step=step, size=100, files={})
        service.records.put(f"fusion-{step}", fusion)
        judged(service, step, verdict)
    judged(service, 500, "declined")
    publication = PublicationRecord(
        fusion="fusion-300", window="window-300", step=300, tag="t", commit="c", weights_hash="h",
        model_name="m", version="1",
    )  # fmt: skip
    service.records.put("publication", publication)
    promotion = PromotionRecord(fusion="fusion-300", step=300, number=1, promoted=True, reason="")
    service.records.put("fusion-300", promotion)
    looked(service)
    return service


def test_an_empty_workspace_tells_what_it_can(tmp_path: Path) -> None:
    found = told(make_service(tmp_path))
    assert found["look_interval_seconds"] == 60.0
    assert found["checkpoints_total{scored}"] == 0.0
    assert found["workspace_free_bytes"] > 0
    assert not any(name.startswith(("step", "loss", "look_begun")) for name in found)


def test_each_stage_tells_its_newest_step_and_when_that_was(service: Service) -> None:
    fused = service.workspace.root / "records" / "fusion"
    os.utime(fused / "fusion-400.json", (7000, 7000))
    os.utime(fused / "fusion-300.json", (6000, 6000))
    found = told(service)
    steps = {name: value for name, value in found.items() if name.startswith("step{")}
    assert steps == {
        "step{seen}": 500, "step{scored}": 500, "step{fused}": 400, "step{published}": 300,
        "step{champion}": 300,
    }  # fmt: skip
    assert found["step_timestamp_seconds{seen}"] == 500.0
    assert found["step_timestamp_seconds{fused}"] == 7000.0
    assert abs(found["step_timestamp_seconds{champion}"] - time.time()) < 60
    assert found["checkpoint_interval_seconds"] == 100.0


def test_losses_are_those_of_the_newest_on_report_text(service: Service) -> None:
    found = told(service)
    assert found["loss_nats{raw}"] == pytest.approx(2.6)
    assert found["loss_nats{best_single}"] == pytest.approx(2.8)
    assert found["loss_nats{fusion}"] == pytest.approx(2.75)
    assert found["loss_nats{champion}"] == pytest.approx(2.5)


def test_losses_of_another_corpus_than_the_last_look_had_are_not_told(service: Service) -> None:
    looked(service, corpus="another")
    found = told(service)
    assert not any(name.startswith("loss") for name in found)
    assert found["step{scored}"] == 500


def test_checkpoints_that_are_due_again_on_another_text_are_in_the_queue(
    service: Service,
) -> None:
    queue = [Queued(signature=f"s{step}", step=step, written=step) for step in (400, 500)]
    looked(service, queue=queue)
    assert told(service)["queue_length"] == 0
    looked(service, queue=queue, corpus="another")
    assert told(service)["queue_length"] == 2


def test_the_queue_is_what_was_due_and_has_no_record_since(service: Service) -> None:
    queue = [Queued(signature=f"s{step}", step=step, written=step) for step in (500, 600, 700)]
    left = [Pending(name=f"step{n}", signature=f"s{n}", reason="") for n in (800, 900, 1000)]
    looked(service, queue=queue, held=left[:2], incomplete=left[2:], unfinished=3)
    found = told(service)
    assert found["queue_length"] == 2
    assert found["step{seen}"] == 700
    assert found["step{scored}"] == 500
    assert (found["checkpoints_held"], found["checkpoints_incomplete"]) == (2, 1)
    assert (found["looks_unfinished"], found["publication_waits"]) == (3, 0)
    bad = QuarantineRecord(
        name="step600", uri="u", step=600, signature="s600", architecture=None, reason="NaN"
    )
    service.records.put("s600", bad)
    found = told(service)
    assert found["queue_length"] == 1
    assert found["checkpoints_total{quarantined}"] == 1


def test_verdicts_are_counted_and_so_is_the_streak_of_those_declined(service: Service) -> None:
    found = told(service)
    assert found["windows_total{published}"] == 1
    assert found["windows_total{declined}"] == 2
    assert found["declined_streak"] == 2
    judged(service, 600, "publish")
    assert told(service)["declined_streak"] == 0


def test_costs_are_gpu_seconds_and_bytes_of_what_has_weight(service: Service) -> None:
    jobs = [{"ended": 1.0, "hours": 0.5, "models": 1}, {"ended": 2.0, "hours": 0.25, "models": 3}]
    meter = service.workspace.folder("cache") / "scoring.jsonl"
    meter.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    found = told(service)
    assert found["scoring_seconds_total"] == 0.75 * 3600
    assert found["merges_total"] == 2
    assert found["merge_bytes_total{read}"] == 2 * 2 * 100  # two fusions of two checkpoints each
    assert found["merge_bytes_total{written}"] == 2 * 100
    assert found["fusion_size_bytes"] == 100
