"""The Kubernetes manifests: by the published schemas, and by what must hold between them and the service."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer._click.exceptions import UsageError

from jobs.settings import Settings
from tests.ops.cli import parse_command
from tests.ops.queries import check_query, exported

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra/kuberay"
FILES = ("cluster.yaml", "control.yaml", "node.yaml")
KUBERNETES = "1.34"
SCHEMAS = {
    kind: yaml.safe_load((Path(__file__).parent / "schemas" / f"{kind.lower()}.yaml").read_text())
    for kind in ("RayCluster", "ScaledObject")
}
COMPOSE = yaml.load((ROOT / "docker-compose.yml").read_text(), yaml.CSafeLoader)
IMAGES = {one["image"].replace("${REEL_VERSION:-0.1.0}", "0.1.0") for one in COMPOSE["services"].values()}
ROLE_SECRETS = {  # keys of the Secret, which are make_secrets.py's files, by image
    "reelserve-api": {"redis_url_api", "secret_key", "s3_secret_api"},
    "reelserve-celery": {"redis_url_celery", "secret_key", "s3_secret_celery"},
    "reelserve-scaler": {"redis_url_scaler"},
    "reelserve-node-gpu": {"redis_url_node", "s3_secret_node"},
}
KNOWN = exported()
REFUSALS = (
    AssertionError,
    KeyError,
    jsonschema.ValidationError,
    kubernetes_validate.ValidationError,
    UsageError,
)


def documents(text: str) -> list[dict[str, Any]]:
    """A file's objects, with a name where the scaler fills one in."""
    filled = text.replace("${REEL_NODE_ID}", "reel-m-1").replace("${REEL_POOL}", "m")
    return list(yaml.load_all(filled, yaml.CSafeLoader))


def check_schema(manifest: dict[str, Any]) -> None:
    """Every field, strictly."""
    if manifest["kind"] not in SCHEMAS:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    jsonschema.validate(manifest, SCHEMAS[manifest["kind"]])
    if manifest["kind"] == "RayCluster":
        template = manifest["spec"]["headGroupSpec"]["template"]
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, KUBERNETES, strict=True)


def pod_of(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The pod's spec, of the kinds that have one."""
    spec: Any = manifest.get("spec", {})
    template = spec.get("headGroupSpec", spec).get("template")
    return template and template["spec"]  # type: ignore[no-any-return]


def check_pod(pod: dict[str, Any]) -> None:
    """No rights, no root, limits, settings and a command line that exist."""
    assert pod["securityContext"]["runAsNonRoot"]
    assert "serviceAccountName" in pod or not pod["automountServiceAccountToken"]
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]
    assert container["envFrom"] == [{"configMapRef": {"name": "reelserve"}}]  # one set of settings
    for one in container.get("env", []):
        assert one["name"].removeprefix("REEL_").lower() in Settings.model_fields, one
        if secret := one.get("valueFrom", {}).get("secretKeyRef"):
            assert secret["key"] in COMPOSE["secrets"], one
            assert secret["key"] in ROLE_SECRETS.get(container["image"].partition(":")[0], ()), one
    words = ["/models/wan", "/etc/reel/scaler.toml"]
    parse_command([str(ROOT) if word in words else word for word in container["args"]])
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
    assert container["image"] in IMAGES


def check_node(manifest: dict[str, Any]) -> None:
    """A node: all 8 GPUs, a Ray of its own with a token, time to drain."""
    assert manifest["spec"]["authOptions"] == {"mode": "token"}
    assert manifest["spec"]["rayVersion"] == importlib.metadata.version("ray")
    pod = pod_of(manifest)
    assert pod is not None
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    grace = next(float(one["value"]) for one in container["env"] if one["name"] == "REEL_DRAIN_SECONDS")
    assert pod["terminationGracePeriodSeconds"] > grace + 60
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["reel", "drain", "reel-m-1"]
    # KubeRay puts its own, by Ray's dashboard agent, where one is missing; the health check asks Redis.
    for probe in (container["livenessProbe"], container["readinessProbe"]):
        assert {*probe} <= {"exec", "periodSeconds", "timeoutSeconds", "failureThreshold"}
        assert probe["exec"]["command"][-1] == "/proc/1/cmdline"  # of the container's own process, no program


def check_together(manifests: list[dict[str, Any]]) -> None:
    """What refers to what."""
    labels = [
        (m["spec"].get("template") or m["spec"]["headGroupSpec"]["template"])["metadata"]["labels"]
        for m in manifests
        if pod_of(m)
    ]
    roles = {one["reelserve/role"] for one in labels}
    deployments = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "Deployment"}
    for manifest in manifests:
        kind, spec, name = manifest["kind"], manifest.get("spec", {}), manifest["metadata"]["name"]
        assert manifest["metadata"]["namespace"] == "reelserve", name
        if kind == "PodDisruptionBudget":
            assert spec["selector"]["matchLabels"]["reelserve/role"] in roles, name
        if kind == "NetworkPolicy":
            assert spec["ingress"] == [], name  # Ray listens on all interfaces
            assert spec["podSelector"]["matchLabels"]["reelserve/role"] == "node"
        if kind == "Service":
            assert spec["selector"]["reelserve/role"] in roles, name
        if kind == "ScaledObject":
            assert spec["scaleTargetRef"]["name"] in deployments, name
            check_query(spec["triggers"][0]["metadata"]["query"], KNOWN)
    for name in ("reelserve-beat", "reelserve-exporter"):  # never two at once
        assert deployments[name]["replicas"] == 1
        assert deployments[name]["strategy"] == {"type": "Recreate"}


def check_file(text: str) -> None:
    """One file's objects, each for itself."""
    for manifest in documents(text):
        check_schema(manifest)
        if pod := pod_of(manifest):
            check_pod(pod)
        if manifest["kind"] == "RayCluster":
            check_node(manifest)


def check_all(texts: dict[str, str]) -> None:
    """What must hold over all files."""
    manifests = [one for text in texts.values() for one in documents(text)]
    check_together(manifests)
    kinds = [manifest["kind"] for manifest in manifests]
    assert kinds.count("PodDisruptionBudget") == 2
    assert {"NetworkPolicy", "ScaledObject", "RayCluster"} <= {*kinds}


TEXTS = {name: (FOLDER / name).read_text() for name in FILES}


def test_manifests() -> None:
    for text in TEXTS.values():
        check_file(text)
    check_all(TEXTS)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("node.yaml", "headGroupSpec", "headGroupSpecs"),
        ("node.yaml", "mode: token", "mode: tokens"),
        ("node.yaml", "mode: token", "mode: disabled"),
        ("node.yaml", "gpu: 8, memory", "gpu: 7, memory"),
        ("node.yaml", "PeriodSeconds: 720", "PeriodSeconds: 30"),
        ("node.yaml", "reel, drain", "reel, dry"),
        ("node.yaml", "readinessProbe:", "readyProbe:"),
        ("node.yaml", "readinessProbe:", "startupProbe:"),
        ("node.yaml", "livenessProbe:", "startupProbe:"),
        ("node.yaml", "[grep, -qzx, node, /proc/1/cmdline]", "[python, -m, infra.docker.healthcheck, node]"),
        ("node.yaml", "REEL_DRAIN_SECONDS", "REEL_DRAIN_SECONS"),
        ("node.yaml", "args: [node,", "args: [nod,"),
        ("node.yaml", 'rayVersion: "', 'rayVersion: "1'),
        ("cluster.yaml", "scaleTargetRef: { name", "scaleTargetRef: { nam"),
        ("cluster.yaml", "minReplicaCount: 1", 'minReplicaCount: "1"'),
        ("cluster.yaml", 'threshold: "100"', "threshold: 100"),
        ("cluster.yaml", "reel_webhooks", "reel_webhoks"),
        ("cluster.yaml", "ingress: []", "ingress: [{}]"),
        ("cluster.yaml", "maxUnavailable", "maxUnavailible"),
        ("cluster.yaml", "runAsNonRoot: true", "runAsNonRoot: false"),
        ("control.yaml", "type: Recreate", "type: RollingUpdate"),
        ("control.yaml", "containerPort: 8080", 'containerPort: "http"'),
        ("control.yaml", "reelserve-api:0.1.0", "reelserve-apy:0.1.0"),
        ("control.yaml", "verbs: [get", "verb: [get"),
        ("control.yaml", "configMapRef: { name: reelserve }", "configMapRef: { name: reelserve-scaler }"),
        ("control.yaml", "key: s3_secret_api", "key: s3_secret_key"),
        ("node.yaml", "key: redis_url_node", "key: redis_url_ops"),
    ],
)
def test_a_tampered_manifest_is_refused(file: str, old: str, new: str) -> None:
    assert old in TEXTS[file]
    tampered = TEXTS[file].replace(old, new)
    with pytest.raises(REFUSALS):  # noqa: PT012
        check_file(tampered)
        check_all({**TEXTS, file: tampered})


def test_a_nodes_probes_see_its_process_without_redis() -> None:
    """Each probe's own command, with a process of the node's command line in the place of the container's."""
    pod = pod_of(documents(TEXTS["node.yaml"])[0])
    assert pod is not None
    (container,) = pod["containers"]
    script = "print(flush=True); import time; time.sleep(20)"
    for args, alive in ((container["args"], True), (["drain", "nodes"], False)):
        with subprocess.Popen(
            [sys.executable, "-c", script, *container["command"], *args], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            for name in ("livenessProbe", "readinessProbe"):
                words = [
                    word.replace("/proc/1/", f"/proc/{process.pid}/")
                    for word in container[name]["exec"]["command"]
                ]
                assert (subprocess.run(words, env={}, check=False).returncode == 0) is alive, name
            process.kill()


def test_the_scaler_may_do_what_its_driver_does() -> None:
    """kubectl get, apply (which gets, creates and patches) and delete, of RayClusters alone."""
    role = next(one for one in documents(TEXTS["control.yaml"]) if one["kind"] == "Role")
    driver = (ROOT / "infra/scaler/drivers/kubernetes.py").read_text()
    used = set(re.findall(r'"(get|apply|delete)"', driver))
    assert used == {"get", "apply", "delete"}
    assert role["rules"] == [
        {
            "apiGroups": ["ray.io"],
            "resources": ["rayclusters"],
            "verbs": ["get", "list", "create", "patch", "delete"],
        }
    ]
