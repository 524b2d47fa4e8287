"""A command of the team's own on the candidate: its answers, the paired test, and the decision."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from ckptfuse.errors import CkptfuseError, JobError
from ckptfuse.promotion import champion, waiting
from ckptfuse.records import (
    FusionRecord,
    PlanRecord,
    PromotionRecord,
    PublicationRecord,
    VetoRecord,
)
from ckptfuse.service import Service
from ckptfuse.steps.promote import decide_promotion, settle
from ckptfuse.steps.veto import hear_veto
from ckptfuse.veto import ask, outcome
from tasks import aliases
from tasks.marks import mark
from tests.helpers import make_service, member, plan_record, record_losses

MEMBERS = [member(100, 3.0), member(200, 3.0)]

#: Answers the items that a model's folder says it can, and counts its runs.
EVALUATION = """
import json, sys
from pathlib import Path
model, out = map(Path, sys.argv[1:])
with Path(__file__).with_name("runs").open("a") as runs:
    runs.write(model.name + "\\n")
right = set(json.loads((model / "right.json").read_text()))
with out.open("w") as lines:
    for item in range(20):
        lines.write(json.dumps({"item": f"quiz/{item}", "correct": int(item in right)}) + "\\n")
"""


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """A service whose veto is a real program."""
    (tmp_path / "evaluate.py").write_text(EVALUATION.replace("\\\\n", "\\n"))
    command = [sys.executable, str(tmp_path / "evaluate.py")]
    return make_service(tmp_path, promotion={"veto": {"command": command}})


def runs(service: Service) -> list[str]:
    path = Path(service.params.promotion.veto.command[1]).with_name("runs")
    return path.read_text().split() if path.is_file() else []


def publish(service: Service, step: int, loss: float, right: range) -> PlanRecord:
    """A fusion with this loss that answers these items; published, and decided on if possible."""
    decided = plan_record(step, MEMBERS)
    service.records.put(decided.window, decided)
    record_losses(service, decided.fusion, np.full(6, 10 * loss))
    folder = service.workspace.model(decided.fusion)
    folder.mkdir()
    (folder / "right.json").write_text(str(list(right)))
    merged = FusionRecord(fusion=decided.fusion, step=step, size=0, files={})
    service.records.put(decided.fusion, merged)
    decide_promotion(service, decided)
    publication = PublicationRecord(
        fusion=decided.fusion, window=decided.window, step=step, tag="t", commit="c",
        weights_hash="h", model_name="m", version=str(step // 100),
    )  # fmt: skip
    service.records.put(decided.window, publication)
    return decided


def test_the_p_value_is_that_of_the_exact_sign_test() -> None:
    answers = {str(n): n < 10 for n in range(12)}
    worse = {str(n): n < 5 for n in range(12)} | {"11": True, "another": True}
    found = outcome(worse, answers, against="champion")
    assert (found.items, found.won, found.lost) == (12, 1, 5)
    assert found.p_value == pytest.approx((math.comb(6, 5) + 1) / 2**6)
    assert outcome(answers, answers, against="itself").p_value == 1


def test_a_candidate_waits_until_its_veto_was_heard(service: Service) -> None:
    publish(service, 200, 3.0, range(10))
    decided = publish(service, 300, 2.9, range(12))
    assert decide_promotion(service, decided) is None
    assert settle(service) == []
    assert [record.step for record in waiting(service)] == [300]
    hear_veto(service)
    (promotion,) = settle(service)
    assert promotion.promoted
    assert promotion.reason == (
        "+0.1000 nats better on audit than the champion of step 200; "
        "no veto, 2 items won and 0 lost of 20 (p 1)"
    )
    assert champion(service) == promotion


def test_an_answer_that_comes_while_a_look_settles_is_heard_by_the_next(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(service, 200, 3.0, range(10))
    publish(service, 300, 2.9, range(12))
    present = champion(service)
    assert present is not None
    mark(service, aliases._MARK, str(present.number))  # the alias is no part of this

    def settle_as_it_comes(service: Service) -> list[PromotionRecord]:
        found = settle(service)
        hear_veto(service)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(aliases, "settle", settle_as_it_comes)
        assert aliases.settle_champion.fn(service) == []
    assert not aliases.is_settled(service)
    (promotion,) = settle(service)
    assert promotion.promoted


def test_a_candidate_that_answers_worse_stays_one_however_low_its_loss(service: Service) -> None:
    first = publish(service, 200, 3.0, range(18))
    publish(service, 300, 2.0, range(8))
    hear_veto(service)
    (promotion,) = settle(service)
    assert not promotion.promoted
    assert promotion.reason.startswith(
        "veto: worse answers than the champion of step 200, 0 items won and 10 lost of 20"
    )
    assert promotion.veto is not None
    assert promotion.veto.p_value == pytest.approx(2**-10)
    present = champion(service)
    assert present is not None
    assert present.fusion == first.fusion
    assert waiting(service) == []


def test_no_model_is_asked_twice(service: Service) -> None:
    publish(service, 200, 3.0, range(10))
    assert hear_veto(service) == [], "the first champion has nobody to be compared with"
    publish(service, 300, 2.9, range(10))
    assert [record.correct for record in hear_veto(service)] == [10, 10]
    assert hear_veto(service) == []
    settle(service)
    publish(service, 400, 2.8, range(11))
    hear_veto(service)
    assert runs(service) == ["fusion-200", "fusion-300", "fusion-400"]
    assert len(service.records.all(VetoRecord)) == 3


def test_nobody_is_asked_about_a_fusion_that_is_no_better_on_audit(service: Service) -> None:
    publish(service, 200, 3.0, range(10))
    publish(service, 300, 3.1, range(20))
    assert hear_veto(service) == []
    assert runs(service) == []


def test_what_was_published_meanwhile_still_waits_and_what_was_passed_over_does_not(
    service: Service,
) -> None:
    publish(service, 200, 3.0, range(10))
    publish(service, 300, 2.9, range(10))
    publish(service, 400, 2.8, range(10))
    hear_veto(service)
    publish(service, 500, 2.7, range(10))
    found = {record.step: (record.promoted, record.reason) for record in settle(service)}
    assert found[300] == (False, "step 400 was heard in its place")
    assert found[400][0]
    assert [record.step for record in waiting(service)] == [500]


def test_a_command_that_fails_is_no_veto_and_is_tried_again(service: Service) -> None:
    publish(service, 200, 3.0, range(10))
    decided = publish(service, 300, 2.9, range(10))
    broken = service.workspace.model(decided.fusion) / "right.json"
    text = broken.read_text()
    broken.unlink()
    with pytest.raises(JobError, match="ended with status 1"):
        hear_veto(service)
    assert settle(service) == []
    broken.write_text(text)
    assert [record.model for record in hear_veto(service)] == [decided.fusion]


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("pass", "wrote no answers"),
        ("open(sys.argv[2], 'w').write('yes')", "line 1 'yes'"),
        ('open(sys.argv[2], \'w\').write(\'{"item": "a", "correct": 1}\\n\' * 2)', "two answers"),
    ],
)
def test_answers_that_are_none_are_told(tmp_path: Path, script: str, told: str) -> None:
    with pytest.raises(JobError, match=told):
        ask((sys.executable, "-c", f"import sys; {script}"), tmp_path)


def test_a_name_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    script = (
        "import json, sys; out = open(sys.argv[2], 'w', encoding='utf-8'); "
        "print(json.dumps({'item': 'a\u2028b', 'correct': 1}, ensure_ascii=False), file=out)"
    )
    assert ask((sys.executable, "-c", script), tmp_path) == {"a\u2028b": True}


def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be run"):
        ask(("/no/such/program",), tmp_path)


def test_weights_that_are_gone_are_told(service: Service) -> None:
    publish(service, 200, 3.0, range(10))
    decided = publish(service, 300, 2.9, range(10))
    folder = service.workspace.model(decided.fusion)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(CkptfuseError, match="in neither workspace, ledger nor registry"):
        hear_veto(service)
