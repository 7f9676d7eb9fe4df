"""Start the services of docker-compose.yml on this machine, without containers, and check that they work together.

`python deploy/run_on_host.py` starts Redis with its append-only file, the server with Redis as its job store, and
Prometheus with the configuration of the compose file, all on free ports of 127.0.0.1 and in a temporary folder. It
generates images and meshes, and then checks that
- the server's files are an image and a mesh,
- Redis holds the jobs, and writes its append-only file,
- Prometheus has series for every query of Grafana's dashboard, and evaluates every alert.

It prints what it found. If something is missing, it exits with 1 and the reason. It always stops what it started.
"""

import argparse
import base64
import io
import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NoReturn

import httpx2
import redis
import trimesh
import yaml
from PIL import Image

from examples.server_process import ElasticDit, ServerEnded

DEPLOY = Path(__file__).parent
ROOT = DEPLOY.parent
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "elastic-dit.json"
SOLID = ROOT / "docs" / "images" / "solid.png"
PACKAGES = {"redis-server": "redis-server", "prometheus": "prometheus"}
"""Debian's package for each program."""
SCRAPE_S = 1
# Values for Grafana's variables: all models, and a window with some scrapes before and after the requests.
VARIABLES = {"$model": ".*", "$__rate_interval": "5m", "$__range": "5m"}
START_S, STOP_S, REQUEST_S, SCRAPED_S = 60, 60, 300, 30
BUDGET = "fast"
ROUNDS = 2
"""Two, since a series begins with the first request that it counts, and a rate needs growth after that."""


class Missing(Exception):
    """A check failed. The message says which."""


FAILURES = (Missing, ServerEnded, httpx2.TransportError, redis.RedisError)


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """`file` describes the job's file."""

    job_id: str
    file: str
    seconds: float
    compute_ratio: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Prometheus's answer to a query of the dashboard."""

    panel: str
    expr: str
    num_series: int
    sample: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)  # there is only --help
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        with TemporaryDirectory(prefix="elastic-dit-") as folder:
            prove(Path(folder))
    except FAILURES as reason:
        print(f"\nrun_on_host: {reason or type(reason).__name__}", file=sys.stderr)
        return 1
    return 0


def prove(folder: Path) -> None:
    check_programs()
    redis_port, prometheus_port = free_ports(2)
    prometheus = f"http://127.0.0.1:{prometheus_port}"
    redis_url = f"redis://127.0.0.1:{redis_port}/0"
    # The server starts after Redis and stops before it, so that it can still store or return its jobs.
    with (
        running("redis", redis_command(redis_port, folder), folder),
        redis.Redis.from_url(redis_url) as store,
        running_server(folder, redis_url) as api,
        running("prometheus", prometheus_command(folder, api, prometheus_port), folder),
    ):
        wait_for("Redis", lambda: bool(store.ping()), timeout_s=10)
        wait_for("the server", lambda: _answers(f"{api}/readyz"), timeout_s=START_S)
        wait_for("Prometheus", lambda: _answers(f"{prometheus}/-/ready"), timeout_s=START_S)
        jobs = run_jobs(api, prometheus)
        print_table(
            ["file", "seconds", "compute", "job"],
            [[job.file, f"{job.seconds:.2f}", f"{job.compute_ratio:.2f}", job.job_id] for job in jobs],
        )
        check_redis(store, jobs, folder)
        answers = ask_dashboard(prometheus)
        print_table(["panel", "series", "sample"], [[a.panel, str(a.num_series), f"{a.sample:.4g}"] for a in answers])
        check_alerts(prometheus)
    print(f"\nAll of it works: {len(jobs)} jobs through Redis, {len(answers)} queries of the dashboard answered.")


def check_programs() -> None:
    missing = sorted(package for program, package in PACKAGES.items() if shutil.which(program) is None)
    if missing:
        raise Missing(f"{', '.join(missing)} not found; on Debian: apt-get install {' '.join(missing)}")


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def redis_command(port: int, folder: Path) -> list[str]:
    """The compose file's command, with the data folder and the port that the container image sets by default."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    flags = [flag.replace("${REDIS_MAXMEMORY:-2gb}", "256mb") for flag in compose["services"]["redis"]["command"]]
    data = folder / "redis-data"
    data.mkdir()
    return [*flags, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(data)]


def prometheus_command(folder: Path, api: str, port: int) -> list[str]:
    """Prometheus with the compose file's configuration, but for the server's address and the scrape interval."""
    source = DEPLOY / "prometheus"
    config = yaml.safe_load((source / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    config["scrape_configs"] = [scrape for scrape in config["scrape_configs"] if "static_configs" in scrape]
    for scrape in config["scrape_configs"]:
        scrape["static_configs"] = [{"targets": [api.removeprefix("http://")]}]
    target = folder / "prometheus"
    target.mkdir()
    (target / "prometheus.yml").write_text(yaml.safe_dump(config))
    for name in (*config["rule_files"], "metrics_key"):
        shutil.copy(source / name, target)
    return [
        "prometheus",
        f"--config.file={target / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'prometheus-data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]


@contextmanager
def running_server(folder: Path, redis_url: str) -> Iterator[str]:
    """The address of a server that runs until the block ends. If the block fails, prints the end of its log."""
    print("Starting the server")
    environment = {"ELASTIC_REDIS_URL": redis_url, "HF_HUB_OFFLINE": "1"}
    with ElasticDit("serve", folder / "api.log", "--host", "127.0.0.1", **environment) as server:
        address = server.wait_until_ready()
        try:
            yield address
        except FAILURES:
            print(f"\nThe end of the server's log:\n{server.end_of_log()}", file=sys.stderr)
            raise


@contextmanager
def running(name: str, command: Sequence[str], folder: Path) -> Iterator[None]:
    """A process that runs until the block ends. If the block fails, prints the end of its log."""
    log_path = folder / f"{name}.log"
    print(f"Starting {name}: {' '.join(command)}")
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        except FAILURES:
            lines = log_path.read_text(errors="replace").splitlines()[-15:]
            print("\n".join([f"\nThe end of {name}'s log:", *lines]), file=sys.stderr)
            raise
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(what: str, is_ready: Callable[[], bool], *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if is_ready():
                return
        except (httpx2.TransportError, redis.ConnectionError):
            pass
        time.sleep(0.2)
    raise Missing(f"{what}: not ready after {timeout_s:.0f} s")


def _answers(url: str) -> bool:
    return httpx2.get(url, timeout=5).status_code == 200


def run_jobs(api: str, prometheus: str) -> list[FinishedJob]:
    """An image and a mesh in each round. Between the rounds Prometheus scrapes the counts of the last one."""
    jobs: list[FinishedJob] = []

    def is_scraped() -> bool:
        return ask(prometheus, "sum(elastic_requests_total)", default=0.0) == len(jobs)

    with httpx2.Client(base_url=api, timeout=REQUEST_S) as client:
        for _ in range(ROUNDS):
            jobs += [generate_image(client), generate_mesh(client)]
            wait_for("the last request in Prometheus", is_scraped, timeout_s=SCRAPED_S)
    return jobs


def generate_image(client: httpx2.Client) -> FinishedJob:
    prompt = "a large red circle in the centre, on a plain light background"
    result = _result_of(
        client.post("/v1/images", json={"prompt": prompt, "seed": 7, "budget": {"preset": BUDGET}}), "an image"
    )
    with Image.open(io.BytesIO(base64.b64decode(result["data"][0]["b64_json"]))) as image:
        image.load()
        return _finished_job(result, f"{image.format} of {image.width}x{image.height}")


def generate_mesh(client: httpx2.Client) -> FinishedJob:
    result = _result_of(
        client.post(
            "/v1/meshes",
            data={"seed": "7", "budget": json.dumps({"preset": BUDGET})},
            files={"input_image": (SOLID.name, SOLID.read_bytes())},
        ),
        "a mesh",
    )
    file = io.BytesIO(base64.b64decode(result["data"][0]["b64_json"]))
    mesh = trimesh.load(file, file_type=result["output_format"], force="mesh")
    if not isinstance(mesh, trimesh.Trimesh) or not len(mesh.faces):
        raise Missing("the mesh has no faces")
    return _finished_job(result, f"{result['output_format'].upper()} of {len(mesh.faces)} faces")


def _result_of(response: httpx2.Response, what: str) -> dict[str, Any]:
    if response.status_code != 200:
        raise Missing(f"{what}: the server answered {response.status_code}: {response.text}")
    result: dict[str, Any] = response.json()
    return result


def _finished_job(result: dict[str, Any], file: str) -> FinishedJob:
    return FinishedJob(result["id"], file, result["receipt"]["seconds"]["total"], result["receipt"]["compute_ratio"])


def check_redis(store: redis.Redis, jobs: Sequence[FinishedJob], folder: Path) -> None:
    num_keys = 0
    for job in jobs:
        keys = list(store.scan_iter(match=f"elastic:*{job.job_id}*"))
        if not keys:
            raise Missing(f"Redis has no key elastic:* of job {job.job_id}")
        num_keys += len(keys)
    print(f"Redis holds {num_keys} keys of these {len(jobs)} jobs")
    log_bytes = sum(path.stat().st_size for path in folder.glob("redis-data/appendonlydir/*.aof"))
    if not log_bytes:
        raise Missing("Redis wrote nothing to its append-only file")
    print(f"Redis's append-only files have {log_bytes:,} bytes")


def dashboard_queries(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """The title and query of every panel, with values for Grafana's variables."""
    return [
        (panel["title"], with_variables(target["expr"]))
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]


def with_variables(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


def ask_dashboard(prometheus: str) -> list[Answer]:
    """The answers to all queries. Raises Missing if a query has no series with a number."""
    answers, empty = [], []
    for panel, expr in dashboard_queries(json.loads(DASHBOARD.read_text())):
        samples = [value for value in query(prometheus, expr) if not math.isnan(value)]
        if samples:
            answers.append(Answer(panel, expr, len(samples), samples[0]))
        else:
            empty.append(f"{panel}: {expr}")
    if empty:
        raise Missing("Prometheus has nothing for these queries of the dashboard:\n  " + "\n  ".join(empty))
    return answers


def check_alerts(prometheus: str) -> None:
    """Prometheus must evaluate all alerts without an error, and on a healthy server none may be active."""
    groups = httpx2.get(f"{prometheus}/api/v1/rules", timeout=30).raise_for_status().json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    for rule in rules:
        if rule["health"] != "ok":
            raise Missing(f"alert {rule['name']} is {rule['health']}: {rule.get('lastError')}")
        if rule["state"] != "inactive":
            raise Missing(f"alert {rule['name']} is {rule['state']}: {rule['query']}")
    print(f"Prometheus evaluates {len(rules)} alerts; none is active")


def ask(prometheus: str, expr: str, *, default: float) -> float:
    samples = query(prometheus, expr)
    return samples[0] if samples else default


def query(prometheus: str, expr: str) -> list[float]:
    """The current samples of `expr`."""
    response = httpx2.get(f"{prometheus}/api/v1/query", params={"query": expr}, timeout=30)
    body = response.json()
    if body["status"] != "success":
        raise Missing(f"Prometheus refuses {expr}: {body['error']}")
    return [float(series["value"][1]) for series in body["data"]["result"]]


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    print()
    for row in (heads, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


def _exit_on_signal(number: int, _: FrameType | None) -> NoReturn:
    """SIGTERM unwinds the stack, which stops the processes."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
