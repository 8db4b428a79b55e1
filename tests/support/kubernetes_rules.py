"""What Kubernetes makes of an object: its Pod Security Standards, and which pods a NetworkPolicy connects."""

from __future__ import annotations

from typing import Any

Manifest = dict[str, Any]
COMPONENT = "app.kubernetes.io/component"


def check_restricted(template: Manifest) -> list[str]:
    """Return what a pod's template does against the Pod Security Standard `restricted`."""
    pod = template["spec"]
    context = pod.get("securityContext", {})
    faults = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
        faults.append("may run as root")
    if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        faults.append("has no seccomp profile")
    known = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    faults += [f"volume {each['name']}" for each in pod.get("volumes", []) if not known & set(each)]
    for program in (*pod.get("initContainers", []), *pod["containers"]):
        own = program.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False:
            faults.append(f"{program['name']} may gain privileges")
        if own.get("capabilities") != {"drop": ["ALL"]}:
            faults.append(f"{program['name']} keeps capabilities")
        if own.get("privileged") or own.get("procMount", "Default") != "Default":
            faults.append(f"{program['name']} is privileged")
        if own.get("seccompProfile", {}).get("type") == "Unconfined":
            faults.append("seccomp is unconfined")
        if own.get("appArmorProfile", {}).get("type") == "Unconfined":
            faults.append("AppArmor is unconfined")
    return faults


def allowed_edges(objects: list[Manifest]) -> set[tuple[str, str]]:
    """Return the pairs (caller, callee) of components between which the policies let connections through.

    A connection needs the policy of both: egress of the caller, and ingress of the callee, on the callee's port.
    """
    deployments = [each for each in objects if each["kind"] == "Deployment"]
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    pods = {each["spec"]["template"]["metadata"]["labels"][COMPONENT]: each for each in deployments}
    return {
        (caller, callee)
        for caller in pods
        for callee in pods
        if _passes(policies, "egress", "to", pods[caller], pods[callee], _port(pods[callee]))
        and _passes(policies, "ingress", "from", pods[callee], pods[caller], _port(pods[callee]))
    }


def _port(deployment: Manifest) -> int:
    (program,) = deployment["spec"]["template"]["spec"]["containers"]
    (port,) = program["ports"]
    return port["containerPort"]


def _passes(policies: list[Manifest], direction: str, peers: str, own: Manifest, other: Manifest, port: int) -> bool:
    mine = [each for each in policies if _selects(each["spec"]["podSelector"], own)]
    assert mine, "no policy selects this pod, so everything passes"
    return any(
        port in [each["port"] for each in rule["ports"]]
        and (
            # The gateway's rule without peers is for clients, which are no pods of the installation.
            peers in rule
            and any("podSelector" in peer and _selects(peer["podSelector"], other) for peer in rule[peers])
        )
        for policy in mine
        for rule in policy["spec"].get(direction, [])
    )


def _selects(selector: Manifest, deployment: Manifest) -> bool:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )
