"""The rows behind status and report, and how many steps a fusion was ahead."""

import html
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfuse.errors import CorpusError
from ckptfuse.looks import Look, Pending
from ckptfuse.overview import Overview, Row, overview, steps_saved
from ckptfuse.present import corpus_of_last_look, present_notes
from ckptfuse.records import (
    CheckpointRecord,
    GateRecord,
    MergeLoss,
    PromotionRecord,
    PublicationRecord,
    QuarantineRecord,
    RetirementRecord,
    SkipRecord,
)
from ckptfuse.report.page import render
from ckptfuse.service import Service, open_service
from ckptfuse.window import window_key
from flows.show import notes
from tests.helpers import checkpoint_record, make_service, member, plan_record, record_losses


def rows(*losses: float | None, fused: float | None = None) -> list[Row]:
    """Checkpoints every 100 steps; the first one's window has a fusion of loss ``fused``."""
    return [
        Row(f"step{100 * n}", 100 * n, loss, fused=fused if n == 1 else None)
        for n, loss in enumerate(losses, start=1)
    ]


def saved(*losses: float | None, fused: float | None) -> int | None:
    return steps_saved(rows(*losses, fused=fused))[0]


# -- steps saved -------------------------------------------------------------------------------


def test_a_fusion_is_ahead_until_the_raw_loss_crosses_its_own() -> None:
    assert saved(3.0, 2.9, 2.7, 2.6, fused=2.8) == 150
    assert saved(3.0, 2.9, 2.8, fused=2.8) == 200


def test_a_fusion_that_nobody_has_reached_yet_has_no_number() -> None:
    assert saved(3.0, 2.9, 2.85, fused=2.8) is None


def test_a_fusion_no_better_than_its_own_checkpoint_saves_nothing() -> None:
    assert saved(2.8, 2.7, fused=2.8) == 0
    assert saved(2.8, 2.7, fused=2.9) == 0


def test_without_a_fusion_there_is_nothing_to_save() -> None:
    assert saved(3.0, 2.0, fused=None) is None


def test_checkpoints_without_a_score_are_passed_over() -> None:
    assert saved(3.0, None, 2.6, fused=2.8) == 100


def test_steps_before_the_fusion_do_not_count() -> None:
    found = [Row("early", 50, 1.0), *rows(3.0, 2.6, fused=2.8)]
    assert steps_saved(found)[1] == 50


@given(losses=st.lists(st.floats(1, 4), min_size=1, max_size=8), fused=st.floats(1, 4))
def test_the_crossing_lies_between_the_fusion_and_the_first_checkpoint_as_good(
    losses: list[float], fused: float
) -> None:
    found = saved(*losses, fused=fused)
    as_good = [100 * n for n, loss in enumerate(losses) if loss <= fused]
    if not as_good:
        assert found is None
    else:
        assert found is not None
        assert as_good[0] - 100 <= found <= as_good[0]


# -- the table ---------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """Three scored checkpoints: the window of 200 was skipped, that of 300 was fused."""
    service = make_service(tmp_path)
    for step, loss in ((100, 3.0), (200, 2.8), (300, 2.9)):
        record = checkpoint_record(step, tokenizer="tokenizer", fingerprint=f"fingerprint-{step}")
        service.records.put(f"s{step}", record)
        record_losses(service, record.fingerprint, np.full(6, 10 * loss))
    second = next(r for r in service.records.all(CheckpointRecord).values() if r.step == 200)
    science, corpus = service.params.scientific_digest(), service.scorer.corpus_digest()
    skipped = window_key(second, science, corpus)
    service.records.put(
        skipped, SkipRecord(window=skipped, step=200, reason="superseded by checkpoint-300")
    )
    decided = plan_record(300, [member(s, x) for s, x in ((100, 3.0), (200, 2.8), (300, 2.9))])
    service.records.put("window-300", decided)
    record_losses(service, "fusion-300", np.full(6, 27.0))
    return service


def judged(service: Service, verdict: str) -> None:
    gate = GateRecord.model_validate(
        {"window": "window-300", "fusion": "fusion-300", "step": 300, "verdict": verdict,
         "reason": "because", "test": 1, "alpha": 0.025, "comparisons": []}
    )  # fmt: skip
    service.records.put("gate", gate)


def published(service: Service, *, promoted: bool | None) -> None:
    """``promoted``: None as long as its veto was not heard."""
    judged(service, "publish")
    record = PublicationRecord(
        fusion="fusion-300", window="window-300", step=300, tag="t", commit="c", weights_hash="h",
        model_name="m", version="1",
    )  # fmt: skip
    service.records.put("publication", record)
    if promoted is None:
        return
    promotion = PromotionRecord(
        fusion="fusion-300", step=300, number=1, promoted=promoted, reason=""
    )
    service.records.put("fusion-300", promotion)


def words(service: Service) -> list[str]:
    return [row.verdict for row in overview(service).rows]


def test_an_empty_workspace_has_no_rows(tmp_path: Path) -> None:
    found = overview(make_service(tmp_path))
    assert (found.rows, found.quarantined, found.champion) == ((), (), None)


def test_each_checkpoint_is_a_row_in_the_order_of_training(service: Service) -> None:
    found = overview(service).rows
    assert [(row.step, row.loss) for row in found] == [
        (100, pytest.approx(3.0)),
        (200, pytest.approx(2.8)),
        (300, pytest.approx(2.9)),
    ]


def test_a_fused_window_shows_its_best_single_checkpoint_and_its_gain(service: Service) -> None:
    row = overview(service).rows[-1]
    assert row.best_single == pytest.approx(2.8)
    assert row.fused == pytest.approx(2.7)
    assert row.gain == pytest.approx(0.1)


def test_a_window_goes_from_deciding_to_champion_as_its_records_appear(service: Service) -> None:
    assert words(service) == ["", "skipped", "deciding"]
    judged(service, "publish")
    assert words(service) == ["", "skipped", "publishing"]
    published(service, promoted=True)
    assert words(service) == ["", "skipped", "champion"]


def test_a_declined_window_says_why(service: Service) -> None:
    judged(service, "declined")
    row = overview(service).rows[-1]
    assert (row.verdict, row.reason) == ("declined", "because")


def test_a_published_fusion_that_was_not_promoted_is_no_champion(service: Service) -> None:
    published(service, promoted=False)
    assert words(service)[-1] == "published"
    assert overview(service).champion is None


def test_a_published_fusion_is_a_candidate_until_its_veto_is_heard(service: Service) -> None:
    published(service, promoted=None)
    assert words(service)[-1] == "candidate"
    assert notes(overview(service)) == [
        "step 300 waits for its veto: `ckptfuse veto`, then a look, decides on it"
    ]


def test_a_version_that_retention_deleted_is_retired(service: Service) -> None:
    published(service, promoted=False)
    gone = RetirementRecord(fusion="fusion-300", step=300, tag="t", version="1", reason="old")
    service.records.put("fusion-300", gone)
    assert words(service)[-1] == "retired"


def test_under_the_table_stands_why_the_last_windows_were_declined() -> None:
    rows = [Row(f"step{n}", n, 3.0, verdict="declined", reason=f"why {n}") for n in range(1, 8)]
    rows[5] = replace(rows[5], verdict="skipped", reason="superseded by step7")
    said = present_notes(Overview(tuple(rows), (), None, (), None, None))
    assert said == [f"step {n} was declined: why {n}" for n in (2, 3, 4, 5, 7)]


def test_under_the_table_stands_what_the_last_look_left_and_why(service: Service) -> None:
    def left(n: int, reason: str) -> Pending:
        return Pending(name=f"step{n}", signature=f"s{n}", reason=reason)

    marker = tuple(left(n, "waiting for the marker file 'X'") for n in range(500, 507))
    looked(service, held=(left(400, "access denied"),), incomplete=marker, waits="step 300: no")
    assert notes(overview(service)) == [
        "at the last look (1970-01-01 01:23 UTC):",
        "step400 could not be read or scored: access denied",
        *(f"step{n} is not complete yet: waiting for the marker file 'X'" for n in range(502, 507)),
        "... and so 2 before these",
        "publication waits for the next look: step 300: no",
    ]
    assert "access denied" in render(service)


def looked(service: Service, **left: object) -> None:
    look = Look.model_validate({"begun": 5000.0, **left})
    (service.workspace.folder("cache") / "look.json").write_text(look.model_dump_json())


def test_a_corpus_that_is_gone_is_that_of_the_last_look(service: Service, tmp_path: Path) -> None:
    before, digest = overview(service).rows, service.scorer.corpus_digest()
    (tmp_path / "text.jsonl").unlink()
    blind = open_service(service.params)
    with pytest.raises(CorpusError, match="no such corpus file"):
        corpus_of_last_look(blind)
    looked(blind, corpus=digest)
    told = corpus_of_last_look(blind)
    assert told is not None
    assert "no such corpus file" in told
    assert overview(blind).rows == before
    assert render(blind)
    assert corpus_of_last_look(service) is None


def test_a_checkpoint_above_the_trend_is_marked_as_a_spike(service: Service) -> None:
    for step, loss in ((400, 2.8), (500, 2.8), (600, 3.4), (700, 2.8)):
        record = checkpoint_record(step, tokenizer="tokenizer", fingerprint=f"fingerprint-{step}")
        service.records.put(f"s{step}", record)
        record_losses(service, record.fingerprint, np.full(6, 10 * loss))
    marked = {row.step: row.spike for row in overview(service).rows if row.spike is not None}
    assert marked == {600: pytest.approx(0.6, abs=0.1)}
    assert "step 600 is a spike" in "\n".join(notes(overview(service)))
    assert "above the trend" in render(service)


def test_what_a_rule_found_is_told_by_status_and_report(service: Service) -> None:
    merge = MergeLoss(weights=[0.0, 0.5, 0.5], predicted=2.71, loss=2.7, standard_error=0.004)
    reviewed = plan_record(
        300, [member(s, x) for s, x in ((100, 3.0), (200, 2.8), (300, 2.9))], revision=1,
        notes={"noise_energy": 0.12, "noise_energy_error": 0.003, "noise_energy.c": 0.1,
               "noise_energy.prose": 0.14, "noise_share": 0.8},
        merges=[merge], remarks=["only the newest 2 checkpoints count"],
    )  # fmt: skip
    service.records.put("window-300-1", reviewed)
    expected = [
        "noise energy 0.1200 +- 0.0030 nats (c 0.1000, prose 0.1400)",
        "noise share 0.80: so much of the losses' differences is noise, the rest progress",
        "predicted 2.7100, measured 2.7000 on selection text (standard error 0.0040)",
        "only the newest 2 checkpoints count",
    ]
    assert notes(overview(service)) == [f"weights at step 300: {line}" for line in expected]
    page = html.unescape(render(service))
    assert all(line in page for line in expected)
    assert "Predicted and measured loss of merges" in page


def test_what_strangers_name_their_tensors_is_no_part_of_the_page(service: Service) -> None:
    aside = QuarantineRecord(
        name="step400", uri="", step=400, signature="s400", architecture=None,
        reason="<script>alert(1)</script> is not finite",
    )  # fmt: skip
    service.records.put("s400", aside)
    page = render(service)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 2, "figures are drawn all the same"


def test_the_report_stands_while_a_champion_is_not_scored_on_the_present_text(
    service: Service, tmp_path: Path
) -> None:
    published(service, promoted=True)
    assert "Champion of step 300 by domain" in render(service)
    renewed = make_service(
        tmp_path, corpus={"domains": {"text": {"path": str(tmp_path / "text.jsonl")}}, "salt": "x"}
    )
    page = render(renewed)
    assert "Champion of step 300 by domain" not in page
    assert "champion" in page


def test_a_window_that_was_decided_again_shows_the_parameters_of_now(service: Service) -> None:
    newest = next(r for r in service.records.all(CheckpointRecord).values() if r.step == 300)
    science, corpus = service.params.scientific_digest(), service.scorer.corpus_digest()
    key = window_key(newest, science, corpus)
    members = [member(s, x) for s, x in ((200, 2.8), (300, 2.9))]
    again = plan_record(300, members, window=key, fusion="fusion-again")
    service.records.put(key, again)
    judged(service, "declined")
    record_losses(service, "fusion-again", np.full(6, 26.0))
    row = overview(service).rows[-1]
    assert row.plan == again
    assert (row.fused, row.verdict) == (pytest.approx(2.6), "deciding")


def test_checkpoints_of_the_same_bytes_have_their_own_words(service: Service) -> None:
    judged(service, "declined")
    for step in (400, 500):
        record = checkpoint_record(step, tokenizer="tokenizer", fingerprint="fingerprint-300")
        service.records.put(f"s{step}", record)
    assert words(service) == ["", "skipped", "declined", "", ""]


def test_the_same_bytes_under_two_signatures_are_one_row(service: Service) -> None:
    touched = checkpoint_record(
        300, tokenizer="tokenizer", fingerprint="fingerprint-300", signature="touched"
    )
    service.records.put("touched", touched)
    assert [row.step for row in overview(service).rows] == [100, 200, 300]


def test_quarantined_checkpoints_are_told_apart_from_the_rows(service: Service) -> None:
    aside = QuarantineRecord(
        name="step400", uri="", step=400, signature="s400", architecture=None, reason="NaN"
    )
    service.records.put("s400", aside)
    found = overview(service)
    assert found.quarantined == (aside,)
    assert [row.step for row in found.rows] == [100, 200, 300]
