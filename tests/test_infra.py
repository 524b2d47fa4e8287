"""infra/prefect.yaml is deployed by hand, with Prefect's own commands, and read back."""

import os
import subprocess
from pathlib import Path

from prefect.client.orchestration import get_client

from flows.deploying import POOLS
from tests.conftest import BINARIES

ROOT = Path(__file__).parent.parent


def prefect(*arguments: str) -> None:
    """As the file itself says."""
    named = {
        "CKPTFUSE_TRAJECTORY": "by-hand",
        "CKPTFUSE_HOME": str(ROOT),
        "CKPTFUSE_PARAMS": "params.yaml",
    }
    done = subprocess.run(
        [BINARIES / "prefect", "--no-prompt", *arguments],
        cwd=ROOT,
        env={**os.environ, **named},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_deployment_looks_every_minute_one_look_at_a_time(prefect_server: str) -> None:
    for pool in POOLS:
        prefect("work-pool", "create", pool, "--type", "process", "--overwrite")
    prefect("deploy", "--all", "--prefect-file", "infra/prefect.yaml")
    with get_client(sync_client=True) as client:
        told = client.read_deployment_by_name("watch/by-hand")
    assert told.entrypoint == "flows.watch.watch"
    assert told.parameters == {"params_file": "params.yaml"}
    (schedule,) = told.schedules
    assert schedule.active
    assert schedule.schedule.interval.total_seconds() == 60
    assert told.global_concurrency_limit is not None
    assert told.global_concurrency_limit.limit == 1
    assert told.concurrency_options is not None
    assert told.concurrency_options.collision_strategy == "CANCEL_NEW"
    # The flow as it is now accepts what the deployment gives it.
    assert told.parameters.keys() <= told.parameter_openapi_schema["properties"].keys()
