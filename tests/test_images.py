"""The images: what their file says, and their install script carried out in a clean folder."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

INFRA = Path(__file__).parent.parent / "infra"


def dockerfile() -> dict[str, list[str]]:
    """Target -> its instructions."""
    text = (INFRA / "images" / "Dockerfile").read_text().replace("\\\n", " ")
    stages: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("FROM "):
            stages[line.rpartition(" AS ")[2]] = [line]
        elif line and not line.startswith("#"):
            list(stages.values())[-1].append(line)
    return stages


def test_both_images_run_as_nobody_special_and_have_a_health_check() -> None:
    stages = dockerfile()
    assert set(stages) == {"base", "cpu", "gpu"}
    for target in ("cpu", "gpu"):
        assert stages[target][0] == f"FROM base AS {target}"
        assert stages[target][-1] == "USER 10001:10001"
        (install,) = (line for line in stages[target] if "install.sh" in line)
        assert "sh /source/infra/images/install.sh /source /opt/ckptfuse" in install
    check = next(line for line in stages["base"] if line.startswith("HEALTHCHECK"))
    command = json.loads(check.partition(" CMD ")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")


def test_nothing_is_written_but_in_the_folder_that_every_container_may_write_to() -> None:
    settings = dict(re.findall(r"\b([A-Z_]+)=(/\S+)", " ".join(dockerfile()["base"])))
    for name in ("HF_HOME", "PREFECT_HOME", "PREFECT_UI_STATIC_DIRECTORY", "DVC_SITE_CACHE_DIR"):
        assert settings[name].startswith("/tmp/"), name


def test_the_image_for_gpus_has_what_kernels_are_compiled_with() -> None:
    installed = " ".join(line for line in dockerfile()["gpu"] if "apt-get install" in line)
    assert {"gcc", "libc6-dev"} <= set(installed.split())


def test_the_images_base_is_a_version_that_the_lock_was_tested_with() -> None:
    base = dockerfile()["base"][0]
    version = re.fullmatch(r"FROM python:(3\.\d+)-slim-\w+ AS base", base)
    assert version is not None, base
    assert version[1] in ("3.11", "3.12", "3.13")


def test_what_the_images_are_built_from_is_let_through_to_the_build() -> None:
    lines = (INFRA / "images" / "Dockerfile.dockerignore").read_text().splitlines()
    let_through = {line.removeprefix("!") for line in lines if line.startswith("!")}
    root = INFRA.parent
    assert all((root / name).exists() for name in let_through)
    project = (root / "pyproject.toml").read_text()
    named = set(re.findall(r'"(README\.md|LICENSE)"', project)) | {"pyproject.toml"}
    links = (p for p in (root / "tasks" / "ledger_template").iterdir() if p.is_symlink())
    template = {link.readlink().name for link in links}
    assert named | template | {"ckptfuse", "tasks", "flows", "infra"} <= let_through


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_the_images_install_script_makes_an_environment_that_works(tmp_path: Path) -> None:
    """From a copy of what the build lets through, with the extras of the larger image."""
    source, venv = tmp_path / "source", tmp_path / "venv"
    lines = (INFRA / "images" / "Dockerfile.dockerignore").read_text().splitlines()
    for name in (line.removeprefix("!") for line in lines if line.startswith("!")):
        source.mkdir(exist_ok=True)
        subprocess.run(["cp", "-a", INFRA.parent / name, source / name], check=True)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    install = [source / "infra" / "images" / "install.sh", source, venv, "server,kubernetes"]
    subprocess.run(install, cwd=tmp_path, env=clean, check=True)

    def run(*words: str) -> str:
        command = [venv / "bin" / words[0], *words[1:]]
        return subprocess.run(
            command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
        ).stdout

    locked = dict(
        line.split("==")
        for line in (source / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert run("prefect", "--version").strip() == locked["prefect"]
    assert locked["mlflow"] in run("mlflow", "--version")
    assert "Watch the bucket" in run("ckptfuse", "--help")
    assert locked["torch"] in run("python", "-c", "import torch; print(torch.__version__)")
    program = (
        "import prefect_redis, prefect_kubernetes, psycopg2, flows.watch, tasks.ledger\n"
        "print(tasks.ledger.template('dvc.yaml').is_file())"
    )
    assert run("python", "-c", program).strip() == "True"
