"""Which published fusion is meant, which stay, and whose promotion stands."""

from pathlib import Path

import numpy as np
import pytest

from ckptfuse.errors import ConfigurationError
from ckptfuse.promotion import (
    champion,
    promote_by_hand,
    rollback_by_hand,
    rollback_target,
    standing,
)
from ckptfuse.published import find_publication, publications
from ckptfuse.records import (
    GateRecord,
    PlanRecord,
    PromotionRecord,
    PublicationRecord,
    RetirementRecord,
)
from ckptfuse.retention import why_kept
from ckptfuse.service import Service
from ckptfuse.steps.promote import decide_promotion
from tests.helpers import make_service, member, plan_record, record_losses

BY_HAND = {"by": "someone@somewhere", "reason": "because"}
MEMBERS = [member(100, 3.0), member(200, 3.0)]


def publish(
    service: Service, step: int, version: int, loss: float | None = None
) -> PublicationRecord:
    """Leave the records of a published fusion: with its scores, or else not promoted."""
    decided = plan_record(step, MEMBERS)
    service.records.put(decided.window, decided)
    if loss is not None:
        record_losses(service, decided.fusion, np.full(6, 10 * loss))
    record = PublicationRecord(
        fusion=decided.fusion, window=decided.window, step=step, tag=f"step-{step}-tag",
        commit="c", weights_hash="w", model_name="m", version=str(version),
    )  # fmt: skip
    service.records.put(decided.window, record)
    if loss is None:
        as_good = PromotionRecord(
            fusion=decided.fusion, step=step, number=version, promoted=False, reason="as good"
        )
        service.records.put(decided.fusion, as_good)
    return record


def plan_of(service: Service, step: int) -> PlanRecord:
    return plan_record(step, MEMBERS)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return make_service(tmp_path)


@pytest.mark.parametrize("name", ["300", "v12", "12", "step-300-tag", "fusion-300", "fusion-3"])
def test_a_published_fusion_is_found_by_step_version_tag_or_the_beginning_of_its_id(
    service: Service, name: str
) -> None:
    wanted = publish(service, 300, 12)
    publish(service, 400, 13)
    assert find_publication(service, name) == wanted


def test_a_number_that_is_a_step_of_one_and_the_version_of_another_is_not_guessed(
    service: Service,
) -> None:
    publish(service, 3, 1)
    publish(service, 7, 3)
    with pytest.raises(ConfigurationError, match=r"any of v1 \(step-3-tag\), v3 \(step-7-tag\)"):
        find_publication(service, "3")
    assert find_publication(service, "v3").step == 7


def test_what_was_declined_is_told_with_the_verdict(service: Service) -> None:
    publish(service, 300, 1)
    verdict = GateRecord(
        window="w", fusion="f", step=400, verdict="declined", reason="no better", test=1,
        alpha=0.01, comparisons=[],
    )  # fmt: skip
    service.records.put("g", verdict)
    with pytest.raises(ConfigurationError, match=r"never published \(declined: no better\)"):
        find_publication(service, "400")


# -- the champion by hand ------------------------------------------------------------------------


def test_a_fusion_to_come_is_compared_with_the_champion_by_hand(service: Service) -> None:
    first = publish(service, 300, 1, loss=3.0)
    decide_promotion(service, plan_of(service, 300))
    publish(service, 400, 2, loss=2.5)
    decide_promotion(service, plan_of(service, 400))
    promote_by_hand(service, first, **BY_HAND)
    publish(service, 500, 3, loss=2.9)
    decision = decide_promotion(service, plan_of(service, 500))
    assert decision.promoted, "it is better than the champion by hand, if worse than step 400"
    assert "champion of step 300 (by hand: someone@somewhere)" in decision.reason


def test_a_champion_by_hand_that_cannot_be_scored_any_more_stays(
    service: Service, tmp_path: Path
) -> None:
    promote_by_hand(service, publish(service, 300, 1), **BY_HAND)
    with (tmp_path / "text.jsonl").open("a") as text:
        text.write('\n{"text": "a text that nobody has seen"}')
    domains = {"text": {"path": str(tmp_path / "text.jsonl")}}
    renewed = make_service(tmp_path, corpus={"domains": domains, "salt": "x"})
    publish(renewed, 400, 2, loss=3.0)
    decision = decide_promotion(renewed, plan_of(renewed, 400))
    assert not decision.promoted
    assert "it stays" in decision.reason


def test_rollbacks_go_further_back_each_time_until_the_first(service: Service) -> None:
    published = [publish(service, step, n) for n, step in enumerate((300, 400, 500), start=1)]
    for record in published:
        promote_by_hand(service, record, **BY_HAND)
    for expected in (400, 300):
        target = find_publication(service, rollback_target(service))
        rollback_by_hand(service, target, **BY_HAND)
        present = champion(service)
        assert present is not None
        assert present.step == expected
    assert [record.step for record in standing(service)] == [300]
    with pytest.raises(ConfigurationError, match="no other champion before"):
        rollback_target(service)


def test_promoting_the_champion_again_records_nothing(service: Service) -> None:
    record = publish(service, 300, 1)
    first = promote_by_hand(service, record, **BY_HAND)
    assert promote_by_hand(service, record, by="other@place", reason="too") == first
    assert len(standing(service)) == 1


# -- retention -----------------------------------------------------------------------------------


def kept_steps(service: Service, aliases: dict[str, str] | None = None) -> list[int]:
    reasons = why_kept(service, aliases or {})
    return [record.step for record in publications(service) if record.fusion in reasons]


def retaining(folder: Path, **policy: object) -> Service:
    """Ten published fusions, of steps 100 to 1000."""
    service = make_service(folder, retention=policy)
    for number in range(1, 11):
        publish(service, 100 * number, number)
    return service


def test_without_a_policy_everything_stays(tmp_path: Path) -> None:
    assert len(kept_steps(retaining(tmp_path, every=5))) == 10


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        ({"last": 2}, [900, 1000]),
        ({"last": 1, "every": 4}, [100, 500, 900, 1000]),
        ({"last": 1, "keep": ["300", "step-700-tag"]}, [300, 700, 1000]),
        ({"last": 99}, [100 * n for n in range(1, 11)]),
    ],
)
def test_the_last_every_kth_and_the_named_stay(
    tmp_path: Path, policy: dict[str, object], steps: list[int]
) -> None:
    assert kept_steps(retaining(tmp_path, **policy)) == steps


def test_the_champion_the_one_before_it_and_what_has_an_alias_always_stay(tmp_path: Path) -> None:
    service = retaining(tmp_path, last=1)
    for step in (200, 300, 400):
        promote_by_hand(service, find_publication(service, f"step-{step}-tag"), **BY_HAND)
    assert kept_steps(service) == [300, 400, 1000]
    assert kept_steps(service, {"production": "fusion-500"}) == [300, 400, 500, 1000]


def test_on_another_server_versions_begin_anew_and_the_order_goes_on(tmp_path: Path) -> None:
    service = make_service(tmp_path, retention={"last": 2})
    published = [(450, 1), (500, 2), (550, 3), (600, 1), (400, 2), (350, 3)]
    for test, (step, version) in enumerate(published, start=1):
        record = publish(service, step, version)
        gate = GateRecord(
            window=record.window, fusion=record.fusion, step=step, verdict="publish", reason="",
            test=test, alpha=0.01, comparisons=[],
        )  # fmt: skip
        service.records.put(f"gate-{step}", gate)
    assert [record.step for record in publications(service)] == [step for step, _ in published]
    assert kept_steps(service) == [400, 350]
    assert kept_steps(service, {"candidate": "fusion-350"}) == [400, 350]


def test_every_kth_is_the_same_one_after_others_are_gone(tmp_path: Path) -> None:
    service = retaining(tmp_path, last=1, every=4)
    for record in publications(service):
        if record.step in (200, 300, 400):
            retired = RetirementRecord(
                fusion=record.fusion, step=record.step, tag=record.tag, version=record.version,
                reason="policy",
            )  # fmt: skip
            service.records.put(record.fusion, retired)
    assert kept_steps(service) == [100, 500, 900, 1000]


def test_a_name_in_the_policy_that_was_never_published_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'1700' was never published"):
        why_kept(retaining(tmp_path, last=1, keep=["1700"]), {})
