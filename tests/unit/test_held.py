"""What is held of checkpoints whose files lie in folders of their own."""

from pathlib import Path

from tasks import held
from tests.helpers import make_service


def test_files_of_a_distributed_checkpoint_are_counted_and_named_wherever_they_lie(
    tmp_path: Path,
) -> None:
    service = make_service(tmp_path)
    root = service.workspace.folder("held")
    inner = root / "checkpoints" / "f1" / "model_and_optim"
    inner.mkdir(parents=True)
    (inner / "__0_0.distcp").write_bytes(bytes(100))
    (root / "checkpoints" / "f1" / "config.json").write_bytes(bytes(10))
    (root / "step-1").mkdir()
    (root / "step-1" / "step1").symlink_to(Path("..", "checkpoints", "f1"))
    assert held.cost(service) == held.Cost(1, 110)
    assert {path.name for path in held.only_of(service, "step-1", ())} == {
        "__0_0.distcp", "config.json",
    }  # fmt: skip
