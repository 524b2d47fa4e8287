"""What infra/ deploys, as its files have it: services, manifests, and jobs of the GPU pool."""

import asyncio
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

INFRA = Path(__file__).parent.parent / "infra"
COMPOSE = INFRA / "compose" / "compose.yaml"
KUBERNETES = INFRA / "kubernetes"

Resource = dict[str, Any]


@cache
def compose() -> Resource:
    found: Resource = yaml.safe_load(COMPOSE.read_text())
    return found


def services(ours: bool) -> dict[str, Resource]:
    """Those that run our images, or those that run others'."""
    chosen = compose()["services"].items()
    return {k: v for k, v in chosen if v["image"].startswith("ckptfuse:") == ours}


@cache
def manifests() -> list[Resource]:
    """What the kustomization lists."""
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    return [one for name in listed for one in yaml.safe_load_all((KUBERNETES / name).read_text())]


def pod_specs() -> Iterator[tuple[str, Resource]]:
    for one in manifests():
        if "template" in one.get("spec", {}):
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]
    yield "gpu-pool", gpu_job()["spec"]["template"]["spec"]


def containers() -> Iterator[tuple[str, Resource]]:
    for name, pod in pod_specs():
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            yield name, container


@cache
def gpu_job() -> Resource:
    """The job that Prefect's own worker would create with the defaults of gpu-pool.json."""
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    template = json.loads((KUBERNETES / "gpu-pool.json").read_text())
    values = {"name": "a-run", "command": "prefect flow-run execute", "labels": {}, "env": {}}
    configuration = asyncio.run(
        KubernetesWorkerJobConfiguration.from_template_and_values(template, values)
    )
    job: Resource = configuration.job_manifest
    return job
