"""The Helm chart: against Kubernetes' schemas, against the code that it starts, and with values that cannot work."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chart import (
    CHART,
    KUBERNETES_VERSIONS,
    RefusedValuesError,
    by_name,
    check_schema,
    container,
    environment,
    plain_manifests,
    render,
)
from chart import manifests as rendered
from kubernetes_rules import allowed_edges, check_restricted

from octollm.capability import BUILT_IN_CALLS
from octollm.config import PREFIX, SETTING_SPECS, read_settings, unknown_settings
from octollm.contracts.services import BUILT_IN_ARMS, SERVICES, service_of
from octollm.installation.services import REDIS_SERVICES

SMALL: dict[str, Any] = {}
LARGE = {
    "image": {
        "repository": "registry.example.org/octollm",
        "digest": "sha256:" + "a" * 64,
        "pullSecrets": [{"name": "r"}],
    },
    "gateway": {
        "hosts": ["octollm.example.org"],
        "ingress": {"enabled": True, "className": "nginx", "tlsSecret": "web"},
    },
    "model": {"name": "openai:large", "secret": "provider"},
    "embedding": {"name": "openai:embed", "secret": "provider"},
    "executor": {"sandbox": "bubblewrap"},
    "tls": {"secret": "octollm-tls", "mutual": True},
    "env": {"OCTOLLM_LOG_LEVEL": "warning"},
    "services": {
        "orchestrator": {"autoscaling": {"min": 3, "max": 12, "cpu": 70, "waiting": 24}},
        "reflex": {"autoscaling": {"min": 3, "max": 20, "inFlight": 64}, "nodeSelector": {"pool": "edge"}},
        "coder": {"replicas": 6, "env": {"OCTOLLM_LOG_LEVEL": "debug"}},
        "models": {"replicas": 3},
    },
    "arms": {
        "translator": {
            "image": "registry.example.org/translator:1",
            "port": 8200,
            "calls": ["models:chat", "retriever:search"],
            "enrolment": {"secret": "translator-token"},
        }
    },
    "networkPolicy": {"metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]},
    "podMonitor": {"enabled": True},
}
LARGE["gateway"]["ingress"]["annotations"] = {"nginx.ingress.kubernetes.io/backend-protocol": "HTTPS"}
AIR_GAPPED = {
    "image": {"repository": "mirror.example.org/octollm"},
    "model": {"cache": {"existingClaim": "models", "pull": False}},
    "networkPolicy": {"externalPorts": []},
}
INSTALLATIONS = {"small": SMALL, "large": LARGE, "air-gapped": AIR_GAPPED}
SECRETS = {
    "octollm-database": {"url": "postgresql://octollm:pgsecret@postgres.example.org/octollm"},
    "octollm-redis": {"url": "rediss://:redissecret@redis.example.org:6379/0"},
    "provider": {"api-key": "sk-provider"},
}
WITH_SQL = {"orchestrator", "memory", "monitor"}
# The memory can do without Redis, and caches in it where there is one.
WITH_REDIS = REDIS_SERVICES | {"memory"}


@pytest.fixture(scope="module", params=INSTALLATIONS)
def objects(request):
    return rendered(INSTALLATIONS[request.param])


@pytest.fixture(scope="module")
def deployments(objects):
    found = by_name(objects, "Deployment")
    return {name: found[info.host] for name, info in SERVICES.items()}


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_accepts_every_object(objects, version):
    for each in objects:
        if each["kind"] != "PodMonitor":  # of the Prometheus operator, not of Kubernetes
            check_schema(each, version)


def test_the_schema_would_refuse_a_slip(objects):
    wrong = json.loads(json.dumps(next(each for each in objects if each["kind"] == "Deployment")))
    wrong["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(AssertionError, match="volumeMount"):
        check_schema(wrong, KUBERNETES_VERSIONS[-1])


def test_no_two_objects_share_a_name(objects):
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names))


def test_each_service_runs_under_its_name_and_port(objects, deployments):
    services = by_name(objects, "Service")
    for name, info in SERVICES.items():
        program = container(deployments[name])
        assert program["args"] == ["serve", name]
        assert program["ports"] == [{"name": "http", "containerPort": info.port}]
        service = services[info.host]["spec"]
        assert service["clusterIP"] == "None", "callers balance by themselves"
        assert service["ports"] == [{"name": "http", "port": info.port, "targetPort": "http"}]
        labels = deployments[name]["spec"]["template"]["metadata"]["labels"]
        assert service["selector"].items() <= labels.items()


def test_every_setting_is_one_that_is_read_and_right(deployments):
    for name, deployment in deployments.items():
        variables = environment(deployment, SECRETS)
        ours = {key: value for key, value in variables.items() if key.startswith(PREFIX)}
        assert unknown_settings(ours, tuple(SERVICES)) == [], name
        settings = read_settings(ours, tuple(SERVICES))
        assert settings.advertise_url is not None
        assert settings.advertise_url.endswith(f"://{SERVICES[name].host}:{SERVICES[name].port}")


def test_each_gets_what_it_needs_and_no_more(deployments):
    for name, deployment in deployments.items():
        variables = environment(deployment, SECRETS)
        assert ("OCTOLLM_REDIS_URL" in variables) == (name in WITH_REDIS)
        assert ("OCTOLLM_DATABASE_URL" in variables) == (name in WITH_SQL)
        assert name == "models" or "OCTOLLM_MODEL_API_KEY" not in variables
        pod = deployment["spec"]["template"]["spec"]
        secrets = {each["secret"]["secretName"] for each in pod["volumes"] if "secret" in each}
        assert secrets - {"octollm-tls"} == {f"octollm-keys-{name}"}
        assert pod["automountServiceAccountToken"] is False
    for arm in BUILT_IN_ARMS:
        assert "secretKeyRef" not in json.dumps(deployments[arm])


def test_only_the_executor_with_bubblewrap_is_more_than_restricted(objects):
    for each in objects:
        if each["kind"] in ("Deployment", "Job"):
            faults = check_restricted(each["spec"]["template"])
            sandboxed = "Localhost" in json.dumps(each)
            assert faults == (["AppArmor is unconfined"] if sandboxed else []), each["metadata"]["name"]
            assert not sandboxed or each["metadata"]["name"] == "executor-arm"


def test_probes_ask_for_what_the_services_serve(deployments):
    for deployment in deployments.values():
        program = container(deployment)
        mutual = environment(deployment, SECRETS).get("OCTOLLM_MTLS") == "on"
        for probe, path in {"startupProbe": "/health", "readinessProbe": "/ready", "livenessProbe": "/health"}.items():
            if mutual:  # a kubelet has no certificate
                assert program[probe]["tcpSocket"] == {"port": "http"}
            else:
                assert program[probe]["httpGet"]["path"] == path


def test_a_pod_has_longer_to_end_than_its_service_drains(deployments):
    assert float(SETTING_SPECS["shutdown_grace"].default) == 25
    for deployment in deployments.values():
        grace = float(environment(deployment, SECRETS)["OCTOLLM_SHUTDOWN_GRACE"])
        wait = float(container(deployment)["lifecycle"]["preStop"]["exec"]["command"][1])
        assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > grace + wait


def test_the_network_lets_through_what_is_declared_and_the_bookkeeping(objects):
    edges = allowed_edges(objects)
    declared = {
        (operation.split(":", 1)[0], service_of(call.scope.split(":", 1)[0]))
        for operation, calls in BUILT_IN_CALLS.items()
        for call in calls
    }
    everybody = {(name, target) for name in SERVICES for target in ("orchestrator", "monitor")}
    # The orchestrator sends steps to the arms, and erases memory; the monitor looks at everyone; the gateway forwards.
    known = declared | everybody | {("orchestrator", arm) for arm in BUILT_IN_ARMS}
    known |= {("orchestrator", "memory"), ("reflex", "memory")} | {("monitor", name) for name in SERVICES}
    between = {(source, target) for source, target in edges if {source, target} <= set(SERVICES)}
    assert {edge for edge in between if edge[0] != edge[1]} == {edge for edge in known if edge[0] != edge[1]}


def test_an_arm_of_ones_own_reaches_what_it_declares():
    edges = allowed_edges(rendered(LARGE))
    assert {target for source, target in edges if source == "translator"} == {
        "orchestrator",
        "monitor",
        "models",
        "retriever",
    }
    assert {source for source, target in edges if target == "translator"} == {"orchestrator", "monitor"}


def test_the_migration_runs_before_the_services_change(objects):
    (job,) = by_name(objects, "Job").values()
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert container(job)["args"] == ["migrate"]


def test_what_a_cluster_without_internet_fetches():
    objects = rendered(AIR_GAPPED)
    models = by_name(objects, "Deployment")["models"]["spec"]["template"]["spec"]
    assert "initContainers" not in models
    assert {program["image"] for each in objects for program in _programs(each)} == {"mirror.example.org/octollm:0.1.0"}
    for each in objects:
        if each["kind"] == "NetworkPolicy":
            # A rule without ports would let everything through.
            ports = [port["port"] for rule in each["spec"].get("egress", []) for port in rule["ports"]]
            assert 443 not in ports


def _programs(each: dict[str, Any]) -> list[dict[str, Any]]:
    pod = each["spec"].get("template", {}).get("spec", {}) if "spec" in each else {}
    return [*pod.get("initContainers", []), *pod.get("containers", [])]


def test_nothing_secret_is_a_value():
    text = "".join(render(LARGE).values())
    assert "kind: Secret\n" not in text
    assert "pgsecret" not in text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt value": ({"gatewy": {}}, "gatewy"),
    "no replicas": ({"services": {"coder": {"replicas": 0}}}, "replicas"),
    "no such service": ({"services": {"codre": {"replicas": 1}}}, "services.codre is not a service"),
    "more at least than at most": (
        {"services": {"coder": {"autoscaling": {"min": 5, "max": 2, "cpu": 70}}}},
        "min 5 is greater than max 2",
    ),
    "no metric": ({"services": {"coder": {"autoscaling": {"min": 1, "max": 2}}}}, "names no metric"),
    "an ingress without a host": ({"gateway": {"ingress": {"enabled": True}}}, "gateway.hosts is empty"),
    "a balancer without a host": ({"gateway": {"service": {"type": "LoadBalancer"}}}, "gateway.hosts is empty"),
    "a host with a scheme": ({"gateway": {"hosts": ["https://x.example.org"]}}, "hosts"),
    "mutual TLS without a certificate": ({"tls": {"mutual": True}}, "tls.secret"),
    "a provider without a key": ({"model": {"name": "openai:large"}}, "model.secret"),
    "a provider that is none": ({"model": {"name": "large"}}, "model"),
    "two pods on one volume": ({"services": {"models": {"replicas": 2}}}, "model.cache.existingClaim"),
    "an unknown sandbox": ({"executor": {"sandbox": "none"}}, "sandbox"),
    "an arm called coder": (
        {"arms": {"coder": {"image": "x", "port": 8200, "enrolment": {"secret": "s"}}}},
        "name of a built-in service",
    ),
    "an arm that calls nobody": (
        {"arms": {"mine": {"image": "x", "port": 8200, "calls": ["modles:chat"], "enrolment": {"secret": "s"}}}},
        "modles is neither",
    ),
    "an arm without enrolment": ({"arms": {"mine": {"image": "x", "port": 8200}}}, "enrolment"),
    "replicas that cannot share a key": (
        {"arms": {"mine": {"image": "x", "port": 8200, "replicas": 2, "enrolment": {"secret": "s"}}}},
        "arms.mine.storage.existingClaim",
    ),
    "a port that is none": ({"database": {"port": 70000}}, "port"),
    "a negative wait": ({"shutdown": {"preStopSeconds": -1}}, "preStopSeconds"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_cannot_work_are_refused(case):
    values, reason = REFUSED[case]
    with pytest.raises(RefusedValuesError) as caught:
        render(values)
    assert reason in str(caught.value)


def test_the_plain_manifests_are_those_of_the_chart():
    written = (CHART.parents[1] / "kubernetes" / "octollm.yaml").read_text()
    assert written.splitlines() == plain_manifests().splitlines(), "run scripts/kubernetes-manifests"
