"""The whole stack as processes of this machine: ``python -m infra.native.stack up``, and ``down``.

    PostgreSQL   databases of Prefect and MLflow        MLflow server   artifacts on S3
    S3 store     rclone, files in STATE/s3              Prefect server  deployments, events
    worker cpu   watch, fuse                            workers gpu-N   score, merge shards

All of it listens on loopback alone, on ports and with passwords of its own, and keeps its state in
one folder: ``down`` ends the processes, and ``up`` goes on with what is there. The trajectory of
params.yaml is deployed with ``execution: deployments``; ``STATE/env`` holds what a shell needs to
speak to the stack.
"""

import argparse
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote

from ckptfuse.devices import visible_gpus
from ckptfuse.errors import CkptfuseError
from ckptfuse.params_loading import load_params
from flows.environment import prepare
from infra.native.postgres import FAST_SHUTDOWN, Cluster, free_port, open_cluster
from infra.native.processes import Daemon

BUCKETS = ("checkpoints", "artifacts")
_PROGRAMS = Path(sys.executable).parent
_REGION = "us-east-1"


@dataclass(frozen=True)
class Stack:
    """The stack whose state lies in ``state``, for the trajectory of ``params_file``."""

    state: Path
    params_file: Path
    workers: int = 2  # that score, on a machine without GPUs

    # -- what it is made of ----------------------------------------------------------------

    def daemon(self, name: str) -> Daemon:
        return Daemon(name, self.state / "run")

    @cached_property
    def _settings(self) -> dict[str, str]:
        """Ports and the store's secret: chosen once, so that a restarted stack is where it was."""
        file = self.state / "settings"
        if not file.is_file():
            self.state.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            chosen = {name: str(free_port()) for name in ("prefect", "mlflow", "s3")}
            chosen["secret"] = secrets.token_urlsafe(24)
            file.write_text("".join(f"{name}={value}\n" for name, value in chosen.items()))
        lines = file.read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._settings[name]}"

    @cached_property
    def environment(self) -> dict[str, str]:
        """What a shell, a trainer or a worker needs to speak to the stack."""
        trajectory = load_params(self.params_file).trajectory
        return {
            "PREFECT_API_URL": f"{self.url('prefect')}/api",
            "PREFECT_HOME": str(self.state / "prefect"),
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_S3_ENDPOINT_URL": self.url("s3"),
            "AWS_ENDPOINT_URL": self.url("s3"),
            "AWS_ACCESS_KEY_ID": "ckptfuse",
            "AWS_SECRET_ACCESS_KEY": self._settings["secret"],
            "AWS_DEFAULT_REGION": _REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            # As rclone answers ranged reads; ckptfuse asks for the same by itself.
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "NO_PROXY": "127.0.0.1,localhost",
            "CKPTFUSE_HOME": str(self.params_file.parent),
            "CKPTFUSE_PARAMS": str(self.params_file),
            "CKPTFUSE_BUCKET": f"s3://{BUCKETS[0]}/{trajectory}",
            "CKPTFUSE_EXECUTION": "deployments",
            "CKPTFUSE_SCORING__DEVICE": "cuda" if visible_gpus() else "cpu",
        }

    @property
    def bucket(self) -> Path:
        """The folder behind the trainer's bucket: what is written here is on S3 a second later."""
        return self.state / "s3" / BUCKETS[0] / load_params(self.params_file).trajectory

    # -- up and down -----------------------------------------------------------------------

    def up(self) -> None:
        """Start what does not run, deploy, and wait until all of it answers."""
        self.serve()
        self._deploy()
        self._start_workers()

    def serve(self) -> None:
        """The servers alone."""
        cluster = open_cluster(self.state / "postgres")
        if not self.daemon("postgres").is_running():
            self.daemon("postgres").adopt(cluster.start().pid)
        for database in ("prefect", "mlflow"):
            cluster.create_database(database)
        self.bucket.mkdir(parents=True, exist_ok=True)
        for bucket in BUCKETS:
            (self.state / "s3" / bucket).mkdir(exist_ok=True)
        self._start_servers(cluster)
        self._write_environment()

    def _start_servers(self, cluster: Cluster) -> None:
        environment = self._child_environment()
        self.daemon("s3").start(
            [
                _PROGRAMS / "rclone", "serve", "s3", "--config", os.devnull,
                "--addr", f"127.0.0.1:{self._settings['s3']}",
                "--dir-cache-time", "1s",  # trainers of this machine write to the folder itself
                str(self.state / "s3"),
            ],
            # Not as an argument, which every user of the machine could read.
            environment | {"RCLONE_AUTH_KEY": f'"ckptfuse,{self._settings["secret"]}"'},
        )  # fmt: skip
        self.daemon("prefect").start(
            [
                _PROGRAMS / "prefect", "server", "start", "--host", "127.0.0.1",
                "--port", self._settings["prefect"],
            ],
            environment
            | {
                "PREFECT_API_DATABASE_CONNECTION_URL": cluster.url("prefect", "postgresql+asyncpg"),
                # Leases of the limit on GPUs outlive a restart of the server.
                "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE":
                    "prefect.server.concurrency.lease_storage.filesystem",
                # Without it no run is ever deleted; the second is in seconds: 30 days.
                "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
                "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": "2592000",
            },
        )  # fmt: skip
        self.daemon("mlflow").start(
            [
                _PROGRAMS / "mlflow", "server", "--host", "127.0.0.1",
                "--port", self._settings["mlflow"], "--workers", "1",
                "--no-serve-artifacts", "--default-artifact-root", f"s3://{BUCKETS[1]}",
            ],
            environment | {"MLFLOW_BACKEND_STORE_URI": cluster.url("mlflow")},
        )  # fmt: skip
        self.daemon("s3").wait_for(self.url("s3"))
        self.daemon("prefect").wait_for(f"{self.url('prefect')}/api/health")
        self.daemon("mlflow").wait_for(f"{self.url('mlflow')}/health")

    def _deploy(self) -> None:
        """In a process of its own: Prefect reads the server's address when it is imported."""
        slots = len(visible_gpus()) or self.workers
        done = subprocess.run(
            [sys.executable, "-P", "-m", "flows.cli", "deploy", "--gpus", str(slots)],
            env=self._child_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise CkptfuseError(f"`ckptfuse deploy` failed: {(done.stdout + done.stderr).strip()}")

    def _start_workers(self) -> None:
        slots = len(visible_gpus()) or self.workers
        pools = {"cpu": "ckptfuse", **{f"gpu-{n + 1}": "ckptfuse-gpu" for n in range(slots)}}
        for name, pool in pools.items():
            self.daemon(f"worker-{name}").start(
                [_PROGRAMS / "prefect", "worker", "start", "--pool", pool, "--name", name,
                 "--limit", "1"],
                self._child_environment() | {"PREFECT_WORKER_QUERY_SECONDS": "2"},
            )  # fmt: skip

    def down(self) -> None:
        """End all of it, those first that use the others."""
        for name in (*self._worker_names(), "mlflow", "prefect", "s3"):
            self.daemon(name).stop()
        self.daemon("postgres").stop(FAST_SHUTDOWN)

    def _worker_names(self) -> list[str]:
        return sorted(path.stem for path in (self.state / "run").glob("worker-*.pid"))

    # -- for people ------------------------------------------------------------------------

    def _child_environment(self) -> dict[str, str]:
        prepare(self.state)
        path = f"{_PROGRAMS}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, **self.environment, "PATH": path}

    def _write_environment(self) -> None:
        file = self.state / "env"
        file.touch(mode=0o600)
        lines = [f"export {name}={quote(value)}\n" for name, value in self.environment.items()]
        file.write_text("".join(lines))

    def describe(self) -> str:
        names = ("postgres", "s3", "prefect", "mlflow")
        running = [
            name for name in (*names, *self._worker_names()) if self.daemon(name).is_running()
        ]
        return (
            f"running: {', '.join(running) or 'nothing'}\n"
            f"Prefect  {self.url('prefect')}\nMLflow   {self.url('mlflow')}\n"
            f"S3       {self.url('s3')}, in {self.state / 's3'}\n"
            f"bucket   {self.environment['CKPTFUSE_BUCKET']}, or {self.bucket}\n"
            f"logs     {self.state / 'run'}\n"
            f"a shell  . {self.state / 'env'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.native.stack", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=["up", "down", "status"])
    parser.add_argument("--state", type=Path, default=Path("workspace/stack"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    asked = parser.parse_args()
    stack = Stack(asked.state.resolve(), asked.params.resolve())
    try:
        if asked.action == "up":
            stack.up()
        if asked.action == "down":
            stack.down()
        print(stack.describe())
    except CkptfuseError as error:
        print(f"stack: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
