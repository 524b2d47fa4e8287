"""The compose file, as far as that goes without a container engine: schema, rights, secrets."""

import json
import re
import subprocess
import sys

import pytest

from ckptfuse.store.s3_client import client
from tests.conftest import BINARIES
from tests.deployed import COMPOSE, compose, services
from tests.servers import S3Server


def test_the_compose_file_keeps_to_its_schema() -> None:
    command = [BINARIES / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_container_has_limits_and_rights_of_its_own_and_no_more() -> None:
    for name, one in compose()["services"].items():
        limits = one["deploy"]["resources"]["limits"]
        assert set(limits) == {"cpus", "memory"}, name
        assert one["user"].partition(":")[0] not in ("", "0", "root"), name
        assert one["cap_drop"] == ["ALL"], name
        assert one["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in one, name
        assert one["restart"] in ("unless-stopped", "on-failure:3"), name
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", ())), name
        assert not one["image"].endswith(":latest"), name
        assert ":" in one["image"], name


def test_every_service_that_stays_has_a_health_check() -> None:
    for name, one in services(ours=False).items():
        assert one["healthcheck"]["test"], name
    for name, one in services(ours=True).items():  # the image has one: whose page?
        url = one["environment"].get("HEALTH_URL", "http://127.0.0.1:8080/health")
        command = one["command"]
        if one.get("healthcheck") == {"disable": True}:
            assert one["restart"] == "on-failure:3", name
        elif command[:3] == ["prefect", "worker", "start"]:
            assert "--with-healthcheck" in command, name
            assert url.endswith(":8080/health")
        else:
            port = url.split(":")[2].partition("/")[0]
            assert any(port in word for word in command), (name, url)


def test_nothing_has_a_default_password() -> None:
    text = COMPOSE.read_text()
    variables = re.findall(r"\$\{(\w+)([^}]*)\}", text)
    wanted = {name for name, rest in variables if rest == ":?"}
    assert {name for name, rest in variables if rest not in (":?", ":-", ":-1")} == set()
    assert {name for name, rest in variables if rest.startswith(":-")} == {
        "GPUS",
        "CKPTFUSE_NOTIFY_URL",
    }
    example = dict(
        line.split("=", 1)
        for line in (COMPOSE.parent / "env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert set(example) == {name for name, _ in variables}
    secrets = {name for name in wanted if name.endswith(("PASSWORD", "_KEY"))}
    assert len(secrets) == 12
    assert {example[name] for name in secrets} == {""}
    for name, one in compose()["services"].items():
        for key, value in (one.get("environment") or {}).items():
            if re.search("PASSWORD|SECRET|AUTH", key):
                assert "${" in value, (name, key)


def test_the_service_may_read_checkpoints_and_do_nothing_else_there() -> None:
    told = compose()["configs"]["s3-identities"]["content"]
    filled = re.sub(r"\$\{(\w+):\?\}", r"\1", told)
    rights = {one["name"]: one["actions"] for one in json.loads(filled)["identities"]}
    on_checkpoints = {a for a in rights["service"] if a.endswith(":checkpoints") or ":" not in a}
    assert on_checkpoints == {"Read:checkpoints", "List:checkpoints"}
    assert "Write:mlflow" in rights["service"]
    assert rights["trainer"] == ["Read:checkpoints", "List:checkpoints", "Write:checkpoints"]


def test_what_depends_on_a_service_names_one_that_gets_there() -> None:
    everything = compose()["services"]
    for name, one in everything.items():
        for wanted, how in (one.get("depends_on") or {}).items():
            needed = everything[wanted]
            assert not needed.get("profiles"), (name, wanted)
            if how["condition"] == "service_completed_successfully":
                assert needed["restart"] == "on-failure:3", (name, wanted)
        for mount in one.get("volumes", ()):
            source = mount.partition(":")[0]
            if source.startswith("."):
                assert (COMPOSE.parent / source).exists(), mount
            elif not source.startswith("$"):
                assert source in compose()["volumes"], mount


def test_the_buckets_are_made_once(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    moto_server.use(monkeypatch)
    names = compose()["services"]["buckets"]["command"][2:]
    command = [sys.executable, COMPOSE.parent / "buckets.py", *names]
    said = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert said == ["checkpoints: made\nmlflow: made\n", "checkpoints: there\nmlflow: there\n"]
    for name in names:
        client().delete_bucket(Bucket=name)
    client.cache_clear()
