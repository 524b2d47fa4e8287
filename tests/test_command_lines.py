"""Command lines and settings of compose file and manifests, as the programs themselves see them."""

import re
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from tests.command_lines import parse
from tests.deployed import COMPOSE, KUBERNETES, containers, services


def command_lines() -> Iterator[list[str]]:
    for one in services(ours=True).values():
        yield [re.sub(r"\$\{GPUS:-1\}", "1", word) for word in one["command"]]
    for _, container in containers():
        words = container["args"]
        yield words.split() if isinstance(words, str) else words


def test_the_programs_know_every_command_line() -> None:
    lines = {tuple(line) for line in command_lines()}
    programs = {line[0] for line in lines}
    assert programs == {"python", "prefect", "mlflow", "ckptfuse"}
    for line in lines:
        if line[0] == "python":
            assert (COMPOSE.parent / Path(line[1]).name).is_file()
        else:
            parse(line)


def test_a_command_line_with_a_slip_is_refused() -> None:
    for words in (
        ["prefect", "worker", "start", "--pol", "ckptfuse"],
        ["mlflow", "server", "--artifact-root", "x"],
        ["ckptfuse", "metrics", "--prot", "1"],
        ["ckptfuse", "metricks"],
    ):
        with pytest.raises(Exception, match=r"(?i)no such|unknown|unused"):
            parse(words)


def settings() -> Iterator[tuple[str, str]]:
    """Every variable that is set for our images, with its value."""
    for one in services(ours=True).values():
        yield from one["environment"].items()
    told = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    for generator in told["configMapGenerator"]:
        yield from (tuple(line.split("=", 1)) for line in generator.get("literals", ()))
    for path in (KUBERNETES / "secrets").glob("*.env.example"):
        yield from (tuple(line.split("=", 1)) for line in path.read_text().splitlines())
    for _, container in containers():
        yield from ((v["name"], v["value"]) for v in container.get("env", ()))


def test_the_programs_know_every_setting() -> None:
    import mlflow.environment_variables
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_valid_setting_names

    from ckptfuse.params import Params

    prefect = _get_valid_setting_names(Settings)
    for name, _ in settings():
        if name.startswith(("PREFECT_REDIS_", "PREFECT_INTEGRATIONS_")):
            continue  # of packages beside Prefect: below
        if name.startswith("PREFECT_"):
            assert name in prefect, name
        elif name.startswith("CKPTFUSE_") and name not in ("CKPTFUSE_HOME", "CKPTFUSE_NOTIFY_URL"):
            section, _, key = name.removeprefix("CKPTFUSE_").lower().partition("__")
            fields = Params.model_fields
            assert section in fields, name
            if key:
                assert key in fields[section].annotation.model_fields, name  # type: ignore[union-attr]
        elif name in ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_DEFAULT_ARTIFACT_ROOT"):
            from mlflow.cli import server

            assert name in {option.envvar for option in server.params}
        elif name.startswith("MLFLOW_"):
            assert hasattr(mlflow.environment_variables, name), name
        else:
            assert name.startswith("AWS_") or name in ("HEALTH_URL", "CKPTFUSE_HOME",
                                                       "CKPTFUSE_NOTIFY_URL"), name  # fmt: skip


def test_prefects_redis_and_kubernetes_packages_take_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prefect_kubernetes.settings import KubernetesSettings
    from prefect_redis.client import RedisMessagingSettings

    for name, value in settings():
        if value.startswith("prefect_redis."):
            module = import_module(value)
            wanted = {
                "PREFECT_SERVER_EVENTS_MESSAGING_BROKER": "Consumer",
                "PREFECT_SERVER_EVENTS_MESSAGING_CACHE": "Cache",
                "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "CausalOrdering",
                "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "ConcurrencyLeaseStorage",
            }[name]
            assert hasattr(module, wanted), name
    monkeypatch.setenv("PREFECT_REDIS_MESSAGING_URL", "redis://:x@redis:6379/0")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES", "ckptfuse")
    assert RedisMessagingSettings().url == "redis://:x@redis:6379/0"
    assert KubernetesSettings().observer.namespaces == {"ckptfuse"}


def test_prefects_servers_delete_old_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings.models.root import Settings

    prefix = "PREFECT_SERVER_SERVICES_DB_VACUUM_"
    found = [(name, value) for name, value in settings() if name.startswith(prefix)]
    assert len(found) == 4  # compose and Kubernetes
    for name, value in found:
        monkeypatch.setenv(name, value)
        vacuum = Settings().server.services.db_vacuum
    assert "flow_runs" in vacuum.enabled_vacuum_types
    assert vacuum.retention_period == timedelta(days=30)
