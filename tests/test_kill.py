"""Killed after any external call of a fusion and run again, the service ends where it would have.

A trajectory is fused once; two more checkpoints land. One watch run of what follows, undisturbed,
is what every other must come to: the same run killed with SIGKILL after its first, second, ...
external call (tests/killing.py), and then repeated. Weights are merged in two shards, a task each.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows.watch import watch
from tests.conftest import Project, Trajectory, environment, make_project
from tests.forked import run_forked
from tests.helpers import split_weights

pytestmark = pytest.mark.usefixtures("prefect_server")

#: Where a kill leaves most behind: in the ledger, and half in MLflow. All in `make test-faults`.
SEAM = "mlflow create_model_version"

SHARES = 2


@dataclass
class Scene:
    """A project before the fusion that is disturbed, the calls of that fusion, and how it ends."""

    project: Project
    before: Path
    calls: list[str] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)

    def restore(self) -> None:
        shutil.rmtree(self.project.workspace)
        shutil.copytree(self.before, self.project.workspace, symlinks=True)

    def watch(self, kill_after: int = 0) -> tuple[int, list[str]]:
        """One watch run; its exit status and the external calls that it made."""
        done = self._run("disturbed", str(kill_after))
        return done.returncode, done.stdout.splitlines()

    def observe(self) -> dict[str, Any]:
        done = self._run("observed")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        asked = [str(self.project.folder), *arguments]
        return run_forked(f"tests.killing:{program}", asked, Path.cwd(), environment())

    def killed_after(self, number: int) -> dict[str, Any]:
        """What there is after a run that was killed there, and another run."""
        self.restore()
        status, calls = self.watch(number)
        assert (status, calls) == (-signal.SIGKILL, self.calls[:number])
        assert self.watch()[0] == 0
        return self.observe()


@pytest.fixture(scope="module")
def scene(
    prefect_server: str, trajectory: Trajectory, tmp_path_factory: pytest.TempPathFactory
) -> Scene:
    folder = tmp_path_factory.mktemp("kill")
    sharded = Trajectory(folder / "sharded", trajectory.corpus)
    shutil.copytree(trajectory.bucket, sharded.bucket, copy_function=shutil.copy2)
    for path in sharded.bucket.iterdir():
        split_weights(path)
    project = make_project(folder / "project", sharded, fuse={"shards": 2})
    first, second = trajectory.steps()[:4], trajectory.steps()[4:6]
    project.land(*first)
    assert watch(project.params_file).published == 1
    project.land(*second)
    shutil.copytree(project.workspace, folder / "before", symlinks=True)
    made = Scene(project, folder / "before")
    status, made.calls = made.watch()
    assert status == 0
    made.outcome = made.observe()
    return made


def test_a_kill_at_a_seam_between_systems_changes_nothing(scene: Scene) -> None:
    found = scene.killed_after(scene.calls.index(SEAM) + 1)
    assert differences(found, scene.outcome) == {}


@pytest.mark.faults
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("share", range(SHARES))
def test_a_kill_after_any_external_call_changes_nothing(scene: Scene, share: int) -> None:
    """In shares, for as many processes, each with a scene of its own."""
    assert len(scene.calls) > 30, "the calls that the service makes are not all counted"
    differing = []
    for number, call in list(enumerate(scene.calls, start=1))[share::SHARES]:
        if different := differences(scene.killed_after(number), scene.outcome):
            differing.append(f"{number}: {call}: {different}")
        print(f"killed after {number} of {len(scene.calls)}, {call}: {len(differing)} differ")
    assert differing == []


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, list[Any]]:
    """What was found and what was expected, where they are not the same."""
    names = found.keys() | expected.keys()
    pairs = {name: [found.get(name), expected.get(name)] for name in sorted(names)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def test_a_scoring_job_ends_with_the_service_that_started_it(
    prefect_server: str, trajectory: Trajectory, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project", trajectory)
    project.land(*trajectory.steps()[:4])
    service = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "watch", "--once"],
        cwd=project.folder,
        env=environment(),
    )
    server = _wait_for_child(service.pid, "ckptfuse.job_forkserver")
    job = _wait_for_child(server, "ckptfuse.job_forkserver")
    service.kill()
    service.wait()
    for _ in range(100):
        if not any(Path(f"/proc/{left}").exists() for left in (server, job)):
            return
        time.sleep(0.1)
    pytest.fail("the scoring job outlived its service")


def _wait_for_child(parent: int, words: str) -> int:
    for _ in range(4000):
        children = Path(f"/proc/{parent}/task/{parent}/children")
        assert children.exists(), "it ended before it scored"
        for child in children.read_text().split():
            command = Path(f"/proc/{child}/cmdline")
            if command.exists() and words in command.read_text():
                return int(child)
        time.sleep(0.05)
    pytest.fail(f"no child process with {words!r} appeared")
