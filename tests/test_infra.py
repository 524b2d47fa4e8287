"""What infra/ says is deployed to a real Prefect server, and read back."""

import json
import os
import subprocess
from pathlib import Path

from tests.conftest import BINARIES

ROOT = Path(__file__).parent.parent


def prefect(*arguments: str) -> str:
    done = subprocess.run(
        [BINARIES / "prefect", "--no-prompt", *arguments],
        cwd=ROOT,
        env={**os.environ, "CKPTFUSE_HOME": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_deployment_looks_every_minute_one_look_at_a_time(prefect_server: str) -> None:
    prefect("work-pool", "create", "ckptfuse", "--type", "process")
    prefect("deploy", "--all", "--prefect-file", "infra/prefect.yaml")
    told = json.loads(prefect("deployment", "inspect", "watch/every-minute", "--output", "json"))
    assert told["entrypoint"] == "flows/watch.py:watch"
    assert told["parameters"] == {"params_file": "params.yaml"}
    (schedule,) = told["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["interval"] == 60.0
    assert told["global_concurrency_limit"]["limit"] == 1
    assert told["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    # The flow as it is now accepts what the deployment gives it.
    assert told["parameters"].keys() <= told["parameter_openapi_schema"]["properties"].keys()
