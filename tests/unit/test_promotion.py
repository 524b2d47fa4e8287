"""Champion or not: the second decision, which spares consumers changes that bring nothing."""

from pathlib import Path

import numpy as np
import pytest

from ckptfuse.promotion import (
    champion,
    promote_by_hand,
    rollback_by_hand,
    rollback_target,
    standing,
)
from ckptfuse.records import FusionRecord, PlanRecord, PromotionRecord, PublicationRecord
from ckptfuse.service import Service
from ckptfuse.steps.promote import decide_promotion, settle
from tests.helpers import make_service, member, plan_record, record_losses

MEMBERS = [member(100, 3.0), member(200, 3.0)]


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return make_service(tmp_path)


def published(service: Service, step: int, loss: float) -> PlanRecord:
    """A fusion that passed the gate, with this loss on every split."""
    decided = plan_record(step, MEMBERS)
    service.records.put(decided.window, decided)
    record_losses(service, decided.fusion, np.full(6, 10 * loss))
    return decided


def publication(step: int) -> PublicationRecord:
    return PublicationRecord(
        fusion=f"fusion-{step}", window=f"window-{step}", step=step, tag=f"step-{step}",
        commit="c", weights_hash="h", model_name="m", version="1",
    )  # fmt: skip


def promoted(service: Service, step: int, loss: float) -> PromotionRecord:
    """What is decided on such a fusion when nothing has to be waited for."""
    found = decide_promotion(service, published(service, step, loss))
    assert found is not None
    return found


def test_before_the_first_promotion_there_is_no_champion(service: Service) -> None:
    assert champion(service) is None


def test_the_first_published_fusion_is_promoted(service: Service) -> None:
    decision = promoted(service, 200, 3.0)
    assert (decision.promoted, decision.number) == (True, 1)
    assert champion(service) == decision


def test_a_better_fusion_takes_over_and_a_worse_one_does_not(service: Service) -> None:
    promoted(service, 200, 3.0)
    better = promoted(service, 300, 2.9)
    assert better.promoted
    assert better.reason == "+0.1000 nats better on audit than the champion of step 200"
    worse = promoted(service, 400, 2.95)
    assert not worse.promoted
    assert worse.reason == (
        "-0.0500 nats on audit against the champion of step 300, more than 0 needed"
    )
    assert champion(service) == better


def test_equal_is_not_better(service: Service) -> None:
    promoted(service, 200, 3.0)
    assert not promoted(service, 300, 3.0).promoted


def test_a_gain_below_the_minimum_does_not_churn_consumers(tmp_path: Path) -> None:
    service = make_service(tmp_path, promotion={"minimum_gain": 0.05})
    promoted(service, 200, 3.0)
    assert not promoted(service, 300, 2.96).promoted
    assert promoted(service, 400, 2.94).promoted


def test_champions_keep_their_distance_in_steps(tmp_path: Path) -> None:
    service = make_service(tmp_path, promotion={"spacing": 150})
    promoted(service, 200, 3.0)
    near = promoted(service, 300, 2.0)
    assert not near.promoted
    assert near.reason == "100 steps from the champion of step 200, at least 150 needed"
    assert promoted(service, 350, 2.9).promoted
    assert promoted(service, 150, 2.8).promoted, "a rollback is a distance too"


def test_a_decision_stands_however_often_it_is_asked_for(service: Service) -> None:
    first, second = published(service, 200, 3.0), published(service, 300, 2.9)
    decisions = [decide_promotion(service, decided) for decided in (first, second, first, second)]
    assert decisions[:2] == decisions[2:]
    assert len(service.records.all(PromotionRecord)) == 2


def test_the_champion_is_the_last_one_promoted_and_not_the_highest_step(service: Service) -> None:
    """After a rollback a better fusion may end at a lower step."""
    promoted(service, 400, 3.0)
    rolled_back = promoted(service, 300, 2.5)
    assert champion(service) == rolled_back


def test_a_champion_that_cannot_be_scored_on_a_new_audit_text_gives_way(
    service: Service, tmp_path: Path
) -> None:
    promoted(service, 200, 1.0)
    with (tmp_path / "text.jsonl").open("a") as text:
        text.write('\n{"text": "a text that nobody has seen"}')
    renewed = make_service(
        tmp_path, corpus={"domains": {"text": {"path": str(tmp_path / "text.jsonl")}}, "salt": "x"}
    )
    decision = promoted(renewed, 300, 3.0)
    assert decision.promoted
    assert "can no longer be scored" in decision.reason


def test_a_candidate_that_waited_until_the_audit_text_changed_is_not_promoted(
    service: Service, tmp_path: Path
) -> None:
    promoted(service, 200, 3.0)
    candidate = published(service, 300, 2.9)
    renewed = make_service(
        tmp_path, corpus={"domains": {"text": {"path": str(tmp_path / "text.jsonl")}}, "salt": "x"}
    )
    record_losses(renewed, "fusion-200", np.full(6, 30.0))  # the champion was scored again
    decision = decide_promotion(renewed, candidate)
    assert decision is not None
    assert not decision.promoted
    assert decision.reason == "it can no longer be scored on the present audit text"


def test_a_decision_by_hand_is_written_though_a_record_before_it_was_removed(
    service: Service,
) -> None:
    for step in (200, 300):
        promoted(service, step, 3.0 - step / 1000)
    one, two = (publication(step) for step in (200, 300))
    promote_by_hand(service, one, by="a", reason="b")
    (service.records.store.root / "promotion" / "fusion-300.json").unlink()  # type: ignore[attr-defined]
    again = promote_by_hand(service, two, by="a", reason="b")
    assert again.number == 4
    assert champion(service) == again


def test_a_rollback_takes_back_what_it_says_though_a_record_was_removed(service: Service) -> None:
    for step in (200, 300, 400):
        promoted(service, step, 3.0 - step / 1000)
    target = publication(300)
    assert rollback_target(service) == target.fusion
    rollback_by_hand(service, target, by="a", reason="b")
    (service.records.store.root / "promotion" / "fusion-400.json").unlink()  # type: ignore[attr-defined]
    assert [record.step for record in standing(service)] == [200, 300]


def test_a_waiting_fusion_whose_plan_was_removed_is_closed(service: Service) -> None:
    service.records.put("window-200", publication(200))
    (record,) = settle(service)
    assert not record.promoted
    assert record.reason == "its plan is no longer among the records"
    assert settle(service) == []


def test_a_champion_whose_weights_were_pruned_gives_way_on_a_new_audit_text(
    service: Service, tmp_path: Path
) -> None:
    promoted(service, 200, 1.0)
    record = FusionRecord(fusion="fusion-200", step=200, size=0, files={})
    service.records.put("fusion-200", record)
    renewed = make_service(
        tmp_path, corpus={"domains": {"text": {"path": str(tmp_path / "text.jsonl")}}, "salt": "x"}
    )
    assert promoted(renewed, 300, 3.0).promoted
