"""A bucket in a trainer's own layout: fused as it is, published as Hugging Face models."""

from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from flows.watch import watch
from tests.conftest import Project, Trajectory, make_project
from tests.unit.test_conversion import EXAMPLE, as_torchtitan

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.faults]


def test_the_same_fusion_is_published_as_of_the_same_checkpoints_in_transformers_layout(
    finished: Project, trajectory: Trajectory, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project", trajectory)
    steps = trajectory.steps()[:4]
    sources = {step: trajectory.bucket / f"checkpoint-{step}" for step in steps}
    for step, source in sources.items():
        as_torchtitan(source, project.bucket / f"step-{step}")
    params = yaml.safe_load(Path(project.params_file).read_text())
    params["scoring"] |= {"converter": EXAMPLE, "model": str(sources[steps[0]])}
    params["watch"] = {"settle_seconds": 0}
    Path(project.params_file).write_text(yaml.safe_dump(params))

    done = watch(project.params_file)
    assert (done.scored, done.published) == (4, 1), done
    assert watch(project.params_file).did_nothing
    ours, theirs = (
        next(p for p in tried.plans() if p["step"] == steps[-1]) for tried in (project, finished)
    )
    weights = [[member["weight"] for member in plan["members"]] for plan in (ours, theirs)]
    assert weights[0] == pytest.approx(weights[1], abs=1e-4)

    (made,) = (project.workspace / "mlartifacts").rglob("*.safetensors")
    merged = load_file(made)
    inputs = [load_file(source / "model.safetensors") for source in sources.values()]
    assert merged.keys() == inputs[0].keys()
    for name, values in merged.items():
        expected = sum(w * tensors[name] for w, tensors in zip(weights[0], inputs, strict=True))
        assert (values - expected).abs().max() < 1e-5, name
    project.cli("verify", "v1")
