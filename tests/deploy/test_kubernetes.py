"""Checks of deploy/k8s that need no cluster: what kustomize renders, by schemas and by what schemas cannot see."""

import re
import tomllib
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from service import cli
from service.api import routes_operations
from service.api.connections import SEND_S
from service.settings import Settings, load_settings
from tests.fixtures.kubernetes import (
    FOLDER,
    ROOT,
    SECRETS,
    Object,
    data_of,
    environment,
    kustomize,
    matches,
    named,
    objects_of,
    of_kind,
    pods_of,
    validate,
    values_of,
    workers_of,
)

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
README = (FOLDER / "README.md").read_text()
LOADER: Object = yaml.safe_load((FOLDER / "overlays/gpu/load-weights.yaml").read_text())
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?")
MARGIN_S = 15 + SEND_S
MODEL = "elastic-dit/model"

pytestmark = pytest.mark.parametrize("overlay", list(SECRETS))


def all_of(overlay: str) -> list[Object]:
    return [*objects_of(overlay), *([LOADER] if overlay == "gpu" else [])]


def test_every_object_follows_its_schema(overlay: str) -> None:
    for item in all_of(overlay):
        validate(item)


@pytest.mark.parametrize("kind", ["Deployment", "NetworkPolicy", "PodMonitor", "PrometheusRule", "ScaledObject"])
def test_unknown_field_is_found(overlay: str, kind: str) -> None:
    for item in of_kind(overlay, kind)[:1]:
        with pytest.raises(jsonschema.ValidationError, match="'mistaken' was unexpected"):
            validate(item | {"spec": item["spec"] | {"mistaken": 1}})


def test_nothing_is_rendered_without_the_operators_secrets(overlay: str) -> None:
    """So that no made-up key is ever applied."""
    for name in SECRETS[overlay]:
        others = {other: text for other, text in SECRETS[overlay].items() if other != name}
        result = kustomize(overlay, others)
        assert result.returncode != 0
        assert f"secrets/{name}" in result.stderr
        assert f"overlays/{overlay}/secrets/{name}" in README or f"$secrets/{name}" in README


def test_quantities_are_numbers_with_units(overlay: str) -> None:
    for item in all_of(overlay):
        for key in ("requests", "limits"):
            for amounts in values_of(item, key):
                assert all(QUANTITY.fullmatch(amount) for amount in amounts.values()), amounts
        assert all(QUANTITY.fullmatch(size) for size in values_of(item, "sizeLimit"))


def test_everything_is_in_one_namespace(overlay: str) -> None:
    (namespace,) = of_kind(overlay, "Namespace")
    for item in all_of(overlay):
        if item is not namespace:
            assert item["metadata"]["namespace"] == namespace["metadata"]["name"], item["metadata"]["name"]


def test_owners_select_their_own_pods_alone(overlay: str) -> None:
    for pod in pods_of(overlay):
        selected = [other.name for other in pods_of(overlay) if matches(pod.owner["spec"]["selector"], other.labels)]
        assert selected == [pod.name]
        for constraint in pod.spec.get("topologySpreadConstraints", ()):
            spread = [other.name for other in pods_of(overlay) if matches(constraint["labelSelector"], other.labels)]
            assert spread == [pod.name]


def test_services_and_their_ports_reach_pods(overlay: str) -> None:
    for service in of_kind(overlay, "Service"):
        (pod,) = (pod for pod in pods_of(overlay) if service["spec"]["selector"].items() <= pod.labels.items())
        assert {port["targetPort"] for port in service["spec"]["ports"]} == set(pod.ports)
        assert pod.name == service["metadata"]["name"]
    for owner in of_kind(overlay, "StatefulSet"):
        assert named(overlay, "Service", owner["spec"]["serviceName"])["spec"]["clusterIP"] == "None"


def test_who_may_connect_to_whom(overlay: str) -> None:
    callers: dict[str, set[str]] = {}
    for policy in of_kind(overlay, "NetworkPolicy"):
        chosen = [pod for pod in pods_of(overlay) if matches(policy["spec"]["podSelector"], pod.labels)]
        rules = policy["spec"].get("ingress", [])
        for pod in chosen:
            callers.setdefault(pod.name, set())
            for rule in rules:
                assert {port["port"] for port in rule["ports"]} <= set(pod.ports)
                for peer in rule["from"]:
                    if "namespaceSelector" in peer:
                        callers[pod.name] |= set(peer["namespaceSelector"]["matchLabels"].values())
                    else:
                        inside = pods_of(overlay)
                        callers[pod.name] |= {
                            other.name for other in inside if matches(peer["podSelector"], other.labels)
                        }
    workers = {pod.name for pod in workers_of(overlay)}
    expected = {"api": {"ingress-nginx", "monitoring"}, **{name: {"monitoring"} for name in workers}}
    if of_kind(overlay, "StatefulSet"):
        expected["redis"] = {"api", *workers}
    assert callers == expected


def test_referenced_secrets_settings_and_volumes_exist(overlay: str) -> None:
    for pod in pods_of(overlay):
        claims = {claim["metadata"]["name"] for claim in pod.owner["spec"].get("volumeClaimTemplates", ())}
        for volume in pod.spec.get("volumes", ()):
            claims.add(volume["name"])
            if "secret" in volume:
                named(overlay, "Secret", volume["secret"]["secretName"])
            elif "persistentVolumeClaim" in volume:
                named(overlay, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
                assert volume["persistentVolumeClaim"]["readOnly"]
            else:
                assert "emptyDir" in volume
        assert {mount["name"] for mount in pod.container["volumeMounts"]} == claims
        environment(overlay, pod)  # looks up ConfigMaps, Secrets and their keys


def test_variables_are_settings_of_the_server(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for pod in pods_of(overlay):
        variables = environment(overlay, pod)
        assert [name for name, value in variables.items() if "$(" in value] == []
        ours = {name: value for name, value in variables.items() if name.startswith("ELASTIC_")}
        assert bool(ours) == pod.is_ours
        for name, value in ours.items():
            assert name.removeprefix("ELASTIC_").lower() in Settings.model_fields, name
            monkeypatch.setenv(name, value)
        if pod.is_ours:
            settings = load_settings()
            assert settings.redis_url is not None
            assert settings.port == pod.ports["http"]
            assert not pod.spec["enableServiceLinks"]  # a service named "elastic" would set ELASTIC_PORT


def test_each_model_has_workers(overlay: str) -> None:
    (api,) = (pod for pod in pods_of(overlay) if pod.name == "api")
    served = environment(overlay, api)["ELASTIC_MODELS"].split(",")
    for pod in workers_of(overlay):
        assert Path(environment(overlay, pod)["ELASTIC_MODELS"]).name == pod.labels[MODEL]
    assert sorted(pod.labels[MODEL] for pod in workers_of(overlay)) == sorted(served)


def test_commands_are_those_of_the_command_line(overlay: str) -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    for pod in pods_of(overlay):
        if pod.is_ours:
            program, name, *options = pod.container["command"]
            assert program == "elastic-dit"
            group.commands[name].make_context(name, options)


def test_probes_ask_what_is_served(overlay: str) -> None:
    served = {route.path for route in routes_operations.router.routes if hasattr(route, "path")}
    for pod in pods_of(overlay):
        probes = [pod.container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
        if pod.is_ours:
            assert [probe["httpGet"]["path"] for probe in probes] == ["/healthz", "/readyz", "/healthz"]
            assert {probe["httpGet"]["port"] for probe in probes} == set(pod.ports)
    for monitor in of_kind(overlay, "PodMonitor"):
        assert {endpoint["path"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} == {"/metrics"}
    assert {"/healthz", "/readyz", "/metrics"} <= served


def test_pods_have_time_to_load_and_to_finish_accepted_jobs(overlay: str) -> None:
    for pod in pods_of(overlay):
        if pod.is_ours:
            stop = pod.container.get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})["sleep"]["seconds"]
            grace_s = float(environment(overlay, pod)["ELASTIC_GRACE_S"])
            assert pod.spec["terminationGracePeriodSeconds"] >= stop + grace_s + MARGIN_S
            probe = pod.container["startupProbe"]
            assert probe["periodSeconds"] * probe["failureThreshold"] < pod.owner["spec"].get(
                "progressDeadlineSeconds", 600
            )
    for pod in workers_of(overlay):
        assert pod.spec["shareProcessNamespace"]  # else SIGTERM is ignored while the model loads


def test_pods_keep_to_the_restricted_standard(overlay: str) -> None:
    (namespace,) = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    (user,) = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    specs = [pod.spec for pod in pods_of(overlay)] + ([LOADER["spec"]] if overlay == "gpu" else [])
    for spec in specs:
        (container,), context = spec["containers"], spec["securityContext"]
        assert context["runAsNonRoot"]
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        if "elastic-dit-serve" in container["image"]:
            assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]


def test_evictions_are_possible_and_one_at_a_time(overlay: str) -> None:
    budgets = of_kind(overlay, "PodDisruptionBudget")
    for pod in pods_of(overlay):
        chosen = [item for item in budgets if matches(item["spec"]["selector"], pod.labels)]
        assert len(chosen) == (1 if pod.is_ours else 0)
        for budget in chosen:
            assert (budget["spec"]["maxUnavailable"], "minAvailable" in budget["spec"]) == (1, False)


def test_images_have_the_version_of_the_package(overlay: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = [pod.container["image"] for pod in pods_of(overlay) if pod.is_ours]
    images += [LOADER["spec"]["containers"][0]["image"]]
    for image in images:
        assert image.rpartition("/")[2] == f"elastic-dit-serve:{version}"


def test_redis_is_that_of_the_compose_file_with_a_password(overlay: str) -> None:
    inside = [pod for pod in pods_of(overlay) if pod.name == "redis"]
    assert [pod.container["image"] for pod in inside] == [COMPOSE["redis"]["image"]] * (overlay == "cpu")
    for pod in inside:
        flags = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", flag) for flag in COMPOSE["redis"]["command"]]
        assert pod.container["command"] == [*flags, "--requirepass", "$(REDIS_PASSWORD)"]
        password = environment(overlay, pod)["REDISCLI_AUTH"]
        assert all(f":{password}@redis:" in url for url in redis_urls(overlay))


def redis_urls(overlay: str) -> set[str]:
    return {environment(overlay, pod)["ELASTIC_REDIS_URL"] for pod in pods_of(overlay) if pod.is_ours}


def test_autoscalers_follow_their_models(overlay: str) -> None:
    scaled = of_kind(overlay, "ScaledObject")
    by_name = {pod.name: pod for pod in workers_of(overlay)}
    assert {item["spec"]["scaleTargetRef"]["name"] for item in scaled} == (set(by_name) if overlay == "gpu" else set())
    # API nodes are ready while they serve a model; only then do they see, and count, calls for the others.
    assert any(item["spec"]["minReplicaCount"] > 0 for item in scaled) == bool(scaled)
    for item in scaled:
        spec, pod = item["spec"], by_name[item["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in pod.owner["spec"]  # each apply would set it again
        wanted, *others = spec["triggers"]
        assert wanted["metadata"]["threshold"] == "1"
        assert wanted["metadata"]["query"].startswith(f'max(elastic_wanted_workers{{model="{pod.labels[MODEL]}"}})')
        assert wanted["metadata"]["ignoreNullValues"] == "false"
        assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"
        assert spec["minReplicaCount"] < spec["maxReplicaCount"]
        for trigger in spec["triggers"]:
            models = set(re.findall(r'model="([^"]*)"', trigger["metadata"]["query"]))
            assert models == {pod.labels[MODEL]}
        assert bool(others) == (spec["minReplicaCount"] == 0)  # without workers, calls are refused and never queue


def test_monitors_reach_all_servers_and_workers_with_the_key(overlay: str) -> None:
    for monitor in of_kind(overlay, "PodMonitor"):
        ours = [pod for pod in pods_of(overlay) if pod.is_ours]
        assert [pod for pod in pods_of(overlay) if matches(monitor["spec"]["selector"], pod.labels)] == ours
        assert {pod.labels[monitor["spec"]["jobLabel"]] for pod in ours} == {"api", "worker"}
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert all(endpoint["port"] in pod.ports for pod in ours)
            credentials = endpoint["authorization"]["credentials"]
            assert credentials["key"] in data_of(named(overlay, "Secret", credentials["name"]))


def test_no_two_objects_have_one_name(overlay: str) -> None:
    names = [(item["kind"], item["metadata"]["name"]) for item in objects_of(overlay)]
    assert not [first for first, second in combinations(sorted(names), 2) if first == second]
    assert f"overlays/{overlay}" in README
