"""A watch run that is killed after its n-th external call, and what there is afterwards.

Both are programs for tests/forked.py, with the folder of a project as their first argument.
`disturbed FOLDER N` runs the service once and kills it (SIGKILL: no clean-up of any kind) right
after its N-th external call, 0 never; it prints the calls. `observed FOLDER` prints what there is
(tests/observing.py): in a fresh process too, since SQLite's caches do not notice a database that
was put back to an earlier state.

An external call is one whose effect outlives the process: a record, a job, a folder of weights, a
command of Git or DVC, a change in MLflow.
"""

import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

import ckptfuse.jobs
import ckptfuse.merge.folder
import tasks.artifacts
import tasks.ledger
import tasks.retention
from ckptfuse.record_files import Records
from flows.watch import watch
from tests.conftest import Project, Trajectory
from tests.observing import observe

_MLFLOW = (
    "create_experiment", "create_run", "log_batch", "log_dict", "log_text", "log_inputs",
    "create_logged_model", "finalize_logged_model", "create_registered_model",
    "create_model_version", "set_terminated", "set_registered_model_alias",
)  # fmt: skip


class Killer:
    """Counts external calls, notes their names, and ends the process after one of them."""

    def __init__(self, at: int, log: int) -> None:
        self.at = at
        self.log = log
        self.count = 0
        self.lock = threading.Lock()

    def called(self, name: str) -> None:
        with self.lock:  # calls from other threads come after the end
            self.count += 1
            os.write(self.log, f"{name}\n".encode())
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, owner: Any, attribute: str, name: Callable[..., str]) -> None:
        real = getattr(owner, attribute)

        @functools.wraps(real)
        def calling(*arguments: Any, **options: Any) -> Any:
            answer = real(*arguments, **options)
            self.called(name(*arguments, **options))
            return answer

        setattr(owner, attribute, calling)

    def install(self) -> None:
        self.wrap(Records, "put", lambda _, key, record, *rest: f"record {record.kind}")
        self.wrap(ckptfuse.jobs, "run_jobs", lambda *_, **__: "scoring job")
        self.wrap(ckptfuse.merge.folder._Work, "merge_missing", lambda *_, **__: "weights written")
        self.wrap(ckptfuse.merge.folder, "write_companions", lambda *_: "configuration written")
        self.wrap(ckptfuse.merge.folder, "appear", lambda *_: "weights renamed")
        self.wrap(tasks.ledger.Ledger, "git", lambda _, command, *rest: f"git {command}")
        self.wrap(tasks.ledger.Ledger, "dvc", lambda _, command, *rest: f"dvc {command}")
        self.wrap(tasks.ledger, "link_tree", lambda *_: "weights linked into the ledger")
        self.wrap(tasks.artifacts, "link_tree", lambda *_: "weights linked into the registry")
        self.wrap(tasks.retention, "remove_folder", lambda *_: "weights pruned")
        for method in _MLFLOW:
            self.wrap(MlflowClient, method, lambda *a, m=method, **_: _mlflow(m, *a))


def _mlflow(method: str, _: MlflowClient, *arguments: Any) -> str:
    alias = f" {arguments[1]}" if method == "set_registered_model_alias" else ""
    return f"mlflow {method}{alias}"


def disturbed() -> None:
    log = os.dup(1)
    os.dup2(2, 1)  # what the service prints is not part of the answer
    Killer(int(sys.argv[2]), log).install()
    watch(_project().params_file)


def observed() -> None:
    print(json.dumps(observe(_project())))


def _project() -> Project:
    folder = Path(sys.argv[1])
    return Project(folder, Trajectory(folder / "bucket", {}))
