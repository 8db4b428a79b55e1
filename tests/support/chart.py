"""The Helm chart, rendered by Helm's own library and validated by Kubernetes' own schemas, without a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "octollm"
TOOLS = Path.home() / ".cache" / "octollm" / "test-tools" / "helm"
# Helm's Go library as a wheel, and the JSON schemas of every release of Kubernetes: too large for everybody's setup.
REQUIREMENTS = ("helm-python-sdk==0.2.2", "kubernetes-validate==1.37.0")
KUBERNETES_VERSIONS = ("1.30", "1.37")
Manifest = dict[str, Any]


class RefusedValuesError(Exception):
    """The chart refuses the values; the text is what `helm install` prints."""


def need_helm() -> None:
    """Make Helm's library importable; where it cannot be had skip, or fail under CI."""
    done = TOOLS / ".complete"
    if not done.exists():
        command = ["pip", "install", "--quiet", "--no-cache-dir", "--upgrade", "--target", str(TOOLS), *REQUIREMENTS]
        installed = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        if installed.returncode != 0:
            without = pytest.fail if os.environ.get("CI") else pytest.skip
            without(f"Helm's library cannot be fetched: {installed.stderr[-300:]}")
        done.touch()
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))


def render(values: dict[str, Any] | None = None, *, namespace: str = "octollm") -> dict[str, str]:
    """Return the rendered files by their names. Raises :class:`RefusedValuesError`."""
    need_helm()
    import helm_python  # noqa: PLC0415  it is there only now

    with helm_python.Chart.load(str(CHART)) as chart:
        try:
            chart.validate_schema(values or {})
            files = chart.render(values or {}, name="octollm", namespace=namespace)
        except helm_python.HelmError as error:
            raise RefusedValuesError(str(error)) from error
    return {name.removeprefix("octollm/templates/"): text for name, text in files.items()}


def manifests(values: dict[str, Any] | None = None) -> list[Manifest]:
    """Return the rendered objects."""
    files = render(values)
    return [
        each
        for name, text in sorted(files.items())
        if name.endswith(".yaml")
        for each in yaml.safe_load_all(text)
        if each is not None
    ]


def plain_manifests() -> str:
    """Return the content of deploy/kubernetes/octollm.yaml: the chart with its default values."""
    header = "# Written by scripts/kubernetes-manifests from deploy/helm/octollm. Change the chart, not this file.\n"
    files = render()
    text = header + "".join(files[name].strip("\n") + "\n" for name in sorted(files) if name.endswith(".yaml"))
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def check_schema(manifest: Manifest, version: str) -> None:
    """Raise ``AssertionError`` when the object is not one that a release of Kubernetes accepts."""
    need_helm()
    import kubernetes_validate  # noqa: PLC0415  it is there only now

    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        name = f"{manifest['kind']} {manifest['metadata']['name']}"
        raise AssertionError(f"{name}, Kubernetes {version}: {error.message}") from error


def by_name(objects: list[Manifest], kind: str) -> dict[str, Manifest]:
    """Return the objects of a kind by name."""
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def container(deployment: Manifest) -> Manifest:
    """Return the one container of a deployment or job."""
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return only


def environment(deployment: Manifest, secrets: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the environment of a deployment's container; ``secrets`` are the Secrets of the namespace."""
    found: dict[str, str] = {}
    for each in container(deployment)["env"]:
        assert each["name"] not in found, f"{each['name']} stands twice"
        if "value" in each:
            found[each["name"]] = each["value"]
        else:
            reference = each["valueFrom"]["secretKeyRef"]
            found[each["name"]] = secrets[reference["name"]][reference["key"]]
    return found
