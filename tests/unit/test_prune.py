"""Which merged weights leave the workspace once their window is judged."""

from pathlib import Path

from ckptfuse.records import FusionRecord, GateRecord, PruneRecord
from tasks.prune import prune
from tests.helpers import make_service, member, plan_record


def test_a_fusion_whose_weights_were_corrected_goes_once_the_other_is_judged(
    tmp_path: Path,
) -> None:
    service = make_service(tmp_path)
    for revision, name in enumerate(("first", "corrected")):
        plan = plan_record(300, [member(100, 2.0), member(300, 1.9)], fusion=name,
                           revision=revision)  # fmt: skip
        service.records.put(name, plan)
        folder = service.workspace.model(name)
        folder.mkdir()
        record = FusionRecord(fusion=name, step=300, size=0, files={})
        service.records.put(name, record)
    prune.fn(service)
    assert service.workspace.model("first").is_dir(), "the window may still be at work on it"
    verdict = GateRecord(
        window="window-300", fusion="corrected", step=300, verdict="publish", reason="", test=1,
        alpha=0.025, comparisons=[],
    )  # fmt: skip
    service.records.put("gate", verdict)
    prune.fn(service)
    assert not service.workspace.model("first").exists()
    assert service.workspace.model("corrected").is_dir()
    found = service.records.get(PruneRecord, "first")
    assert found is not None
    assert "corrected" in found.reason
