"""The Kubernetes manifests, as far as that goes without a cluster: schemas, rights, the GPU."""

import json

import kubernetes_validate
import pytest
import yaml

from tests.deployed import KUBERNETES, containers, gpu_job, manifests, pod_specs

#: The newest whose schemas are at hand, and the oldest that is still maintained.
VERSIONS = ("1.37", "1.34")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_keeps_to_the_schema_of_its_kind(version: str) -> None:
    for one in manifests():
        assert kubernetes_validate.validate(one, version, strict=True) == version


def test_every_manifest_that_is_there_is_listed() -> None:
    told = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    there = {path.name for path in KUBERNETES.glob("*.yaml")}
    assert set(told["resources"]) == there - {"kustomization.yaml", "params.yaml"}
    examples = {f"secrets/{path.stem}" for path in (KUBERNETES / "secrets").glob("*.env.example")}
    assert {name for one in told["secretGenerator"] for name in one["envs"]} == examples


def test_a_job_of_the_gpu_pool_asks_for_its_gpu() -> None:
    job = json.loads(json.dumps(gpu_job()))
    pod = job["spec"]["template"]["spec"]
    resources = pod["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == 1
    assert resources["requests"] == resources["limits"]
    assert [one["key"] for one in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert pod["containers"][0]["args"] == "prefect flow-run execute"
    # Two fields that Prefect's worker insists on and Kubernetes does not know there; it passes them
    # over. The rest the worker makes fit: a name, and a list of the environment and the command.
    del pod["parallelism"], pod["completions"]
    pod["containers"][0] |= {"args": ["prefect"], "env": [{"name": "A", "value": "1"}]}
    for version in VERSIONS:
        kubernetes_validate.validate(job, version, strict=True)


def test_every_pod_is_confined_and_has_limits() -> None:
    for name, pod in pod_specs():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == 10001, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod.get("automountServiceAccountToken") is False or "serviceAccountName" in pod, name
    for name, container in containers():
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name


def test_every_pod_that_stays_is_probed() -> None:
    for one in manifests():
        if one["kind"] == "Deployment":
            (container,) = one["spec"]["template"]["spec"]["containers"]
            ports = {port["name"] for port in container["ports"]}
            assert container["livenessProbe"]["httpGet"]["port"] in ports, one["metadata"]["name"]


def test_what_pods_refer_to_is_made() -> None:
    told = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    assert told["generatorOptions"] == {"disableNameSuffixHash": True}
    made = {("configMap", one["name"]) for one in told["configMapGenerator"]}
    made |= {("secret", one["name"]) for one in told["secretGenerator"]}
    made |= {("claim", one["metadata"]["name"]) for one in manifests()
             if one["kind"] == "PersistentVolumeClaim"}  # fmt: skip
    for name, container in containers():
        for source in container.get("envFrom", ()):
            ((key, reference),) = source.items()
            assert (key.removesuffix("Ref"), reference["name"]) in made, name
    for name, pod in pod_specs():
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        own = (container for of, container in containers() if of == name)
        mounts = {mount["name"] for one in own for mount in one.get("volumeMounts", ())}
        assert mounts == volumes, name
        for volume in pod.get("volumes", ()):
            if "configMap" in volume:
                assert ("configMap", volume["configMap"]["name"]) in made, name
            if "persistentVolumeClaim" in volume:
                assert ("claim", volume["persistentVolumeClaim"]["claimName"]) in made, name
