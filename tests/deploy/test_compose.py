"""Checks of the Dockerfile and the compose file that need no Docker engine."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from service import cli
from service.api.connections import SEND_S
from service.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def instructions(name: str) -> list[str]:
    """The arguments of each instruction of this name, with continuation lines joined."""
    joined = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    return re.findall(rf"^\s*{name} (.*)$", joined, re.MULTILINE)


def with_defaults(value: str) -> str:
    return VARIABLE.sub(r"\2", value)


def seconds(duration: str) -> float:
    assert duration.endswith("s")
    return float(duration.removesuffix("s"))


def gigabytes(size: str) -> float:
    match = re.fullmatch(r"(\d+)gb?", with_defaults(size))
    assert match is not None, size
    return float(match[1])


def test_compose_file_follows_the_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    result = subprocess.run([*command, str(ROOT / "docker-compose.yml")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_dockerfile_passes_the_linter() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == ""


def test_services_are_api_worker_redis_prometheus_and_grafana() -> None:
    assert set(SERVICES) == {"api", "worker", "redis", "prometheus", "grafana"}
    assert OURS == ["api", "worker"]
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["worker"]


def test_ports_are_published_on_this_machine_only() -> None:
    published = [with_defaults(port) for service in SERVICES.values() for port in service.get("ports", ())]
    assert published == ["127.0.0.1:8000:8000", "127.0.0.1:9090:9090", "127.0.0.1:3000:3000"]


def test_only_servers_and_workers_share_the_network_of_redis() -> None:
    assert COMPOSE["networks"]["queue"]["internal"] is True
    assert {name for name, service in SERVICES.items() if "queue" in service["networks"]} == {"redis", *OURS}


def test_redis_syncs_every_write_and_evicts_nothing() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    for flags in ("--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction"):
        assert flags in command
    assert SERVICES["redis"]["volumes"] == ["redis-data:/data"]
    assert "redis-data" in COMPOSE["volumes"]


@pytest.mark.parametrize("name", [name for name in SERVICES if name not in OURS])
def test_third_party_images_are_pinned_and_have_health_checks(name: str) -> None:
    image, _, tag = SERVICES[name]["image"].partition(":")
    assert image
    assert re.match(r"v?\d+\.\d+", tag), SERVICES[name]["image"]
    assert SERVICES[name]["healthcheck"]["test"]


def test_mounted_files_exist() -> None:
    volumes = [with_defaults(volume) for service in SERVICES.values() for volume in service.get("volumes", ())]
    mounts = [volume.split(":")[0] for volume in volumes]
    paths = [ROOT / mount for mount in mounts if mount.startswith("./")]
    assert len(paths) == 4
    assert [path for path in paths if not path.exists()] == []


@pytest.mark.parametrize("name", SERVICES)
def test_memory_and_processes_are_limited(name: str) -> None:
    limits = SERVICES[name]["deploy"]["resources"]["limits"]
    assert gigabytes(limits["memory"]) <= 8
    assert 0 < limits["pids"] <= 2048


def test_redis_has_memory_for_a_copy_of_its_data() -> None:
    (data,) = (flag for flag in SERVICES["redis"]["command"] if "MAXMEMORY" in flag)
    assert gigabytes(SERVICES["redis"]["deploy"]["resources"]["limits"]["memory"]) > 2 * gigabytes(data)


def test_prometheus_scrapes_with_the_mounted_key() -> None:
    (target,) = (
        volume.split(":")[1] for volume in map(with_defaults, SERVICES["prometheus"]["volumes"]) if "key" in volume
    )
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    keys = [scrape["authorization"]["credentials_file"] for scrape in config["scrape_configs"]]
    assert {f"/etc/prometheus/{key}" for key in keys} == {target}
    assert (ROOT / "deploy/prometheus" / keys[0]).read_text() == ""  # no secret in the repository


@pytest.mark.parametrize("name", OURS)
def test_processes_wait_for_redis_and_have_time_to_finish_accepted_jobs(name: str) -> None:
    service, environment = SERVICES[name], SERVICES[name]["environment"]
    assert environment["ELASTIC_REDIS_URL"] == "redis://redis:6379/0"
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert seconds(service["stop_grace_period"]) > float(environment["ELASTIC_GRACE_S"]) + SEND_S


@pytest.mark.parametrize("name", OURS)
def test_every_setting_exists(name: str) -> None:
    in_image = re.findall(r"ELASTIC_[A-Z_]+(?==)", " ".join(instructions("ENV")))
    assert in_image == ["ELASTIC_HOST"]
    for variable in [*in_image, *SERVICES[name]["environment"]]:
        assert variable.removeprefix("ELASTIC_").lower() in Settings.model_fields, variable


@pytest.mark.parametrize("command", [["serve"], *(SERVICES[name]["command"][1:] for name in OURS[1:])])
def test_every_command_is_one_of_the_command_line(command: list[str]) -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    group.commands[command[0]].make_context(command[0], command[1:])


def test_compose_file_passes_the_arguments_of_the_image() -> None:
    arguments = {name for name, _, _ in (argument.partition("=") for argument in instructions("ARG"))}
    for name in OURS:
        assert set(SERVICES[name]["build"]["args"]) == arguments
    assert instructions("FROM") == ["${PYTHON_IMAGE}"]
    default = instructions("ARG")[0].removeprefix("PYTHON_IMAGE=")
    assert with_defaults(SERVICES["api"]["build"]["args"]["PYTHON_IMAGE"]) == default


def test_image_runs_as_an_unprivileged_user_and_has_a_health_check() -> None:
    (user,) = instructions("USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)  # numeric, so that Kubernetes can tell that it is not root
    assert instructions("EXPOSE") == ["8000"]
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert instructions("CMD")[-1] == '["elastic-dit", "serve"]'
    (check,) = instructions("HEALTHCHECK")
    assert "/healthz" in check
    assert "curl" not in check


def test_build_context_holds_what_the_image_copies_and_nothing_else() -> None:
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    allowed = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert copied == allowed
    assert {"checkpoints", "router_weights"} <= copied
    assert [
        model for model in Settings.model_fields["models"].default if not (ROOT / "checkpoints" / model).is_dir()
    ] == []
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_compose_file_holds_no_secret() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert not re.search(r"PASSWORD|SECRET|TOKEN|KEY", name) or value.startswith("${"), name


def test_guide_names_all_variables_and_services() -> None:
    guide = (ROOT / "docs/deployment.md").read_text()
    _, table = guide.split("| variable | default | |\n", 1)
    named = set(re.findall(r"`([A-Z_]+)`", table.split("\n\n")[0]))
    assert named == {name for name, _ in VARIABLE.findall((ROOT / "docker-compose.yml").read_text())}
    assert set(re.findall(r"^\| `([a-z]+)` \|", guide, re.MULTILINE)) == set(SERVICES)


def test_example_override_of_the_guide_uses_existing_services_and_settings() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/deployment.md").read_text(), re.DOTALL)
    for name, service in yaml.safe_load(example)["services"].items():
        assert name in OURS
        for variable in service["environment"]:
            assert variable.removeprefix("ELASTIC_").lower() in Settings.model_fields, variable
