"""Start on this machine, without containers, what docker-compose.yml starts, and see that it works together.

`python deploy/run_on_host.py` starts Redis with its append-only file, the server with Redis as its job store, and
Prometheus with the configuration of the compose file, all on free ports of 127.0.0.1 and in a temporary folder. It asks
the server for pictures and meshes, and then checks that
- the files that came back are a picture and a mesh,
- Redis holds the jobs, and its append-only file is being written,
- Prometheus has series for every query of Grafana's dashboard and runs every alert's.

It prints what it saw, exits with 1 and the reason if something is missing, and stops what it started in any case.
"""

import argparse
import base64
import io
import json
import math
import os
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

DEPLOY = Path(__file__).parent
ROOT = DEPLOY.parent
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "elastic-dit.json"
SOLID = ROOT / "docs" / "images" / "solid.png"
PACKAGES = {"redis-server": "redis-server", "prometheus": "prometheus"}
"""Debian's package of each program."""
SCRAPE_S = 1
# What Grafana would put into the queries: all models, and a window with some scrapes on both sides of the requests.
VARIABLES = {"$model": ".*", "$__rate_interval": "5m", "$__range": "5m"}
START_S, STOP_S, REQUEST_S, SCRAPED_S = 240, 60, 300, 30
BUDGET = "fast"
ROUNDS = 2
"""A series begins with the first request that it counts; only what it grows by after that is a rate."""


class Missing(Exception):
    """Something is not as it should be; the message is for the reader."""


FAILURES = (Missing, httpx2.TransportError, redis.RedisError)


@dataclass(frozen=True, slots=True)
class Made:
    """One finished job, what came back, and what its receipt says."""

    job_id: str
    file: str
    seconds: float
    compute_ratio: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What Prometheus answered to a query of the dashboard."""

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
    redis_port, api_port, prometheus_port = free_ports(3)
    api, prometheus = f"http://127.0.0.1:{api_port}", f"http://127.0.0.1:{prometheus_port}"
    redis_url = f"redis://127.0.0.1:{redis_port}/0"
    # In this order, so that the server, stopped before Redis, can still put back or finish what it has.
    with (
        running("redis", redis_command(redis_port, folder), folder),
        redis.Redis.from_url(redis_url) as store,
        running("prometheus", prometheus_command(folder, api_port, prometheus_port), folder),
        running("api", server_command(api_port), folder, ELASTIC_REDIS_URL=redis_url, HF_HUB_OFFLINE="1") as server,
    ):
        wait_for("Redis", lambda: bool(store.ping()), timeout_s=10)
        wait_for("the server", lambda: _answers(f"{api}/readyz"), timeout_s=START_S, process=server)
        wait_for("Prometheus", lambda: _answers(f"{prometheus}/-/ready"), timeout_s=START_S)
        made = make_all(api, prometheus)
        print_table(
            ["made", "seconds", "compute", "job"],
            [[job.file, f"{job.seconds:.2f}", f"{job.compute_ratio:.2f}", job.job_id] for job in made],
        )
        check_redis(store, made, folder)
        answers = ask_dashboard(prometheus)
        print_table(["panel", "series", "sample"], [[a.panel, str(a.num_series), f"{a.sample:.4g}"] for a in answers])
        check_alerts(prometheus)
    print(f"\nAll of it works: {len(made)} jobs through Redis, {len(answers)} queries of the dashboard answered.")


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
    """As in the compose file, where the image's defaults are the data folder and the port."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    flags = [flag.replace("${REDIS_MAXMEMORY:-2gb}", "256mb") for flag in compose["services"]["redis"]["command"]]
    data = folder / "redis-data"
    data.mkdir()
    return [*flags, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(data)]


def server_command(port: int) -> list[str]:
    return [sys.executable, "-m", "service.cli", "serve", "--host", "127.0.0.1", "--port", str(port)]


def prometheus_command(folder: Path, api_port: int, port: int) -> list[str]:
    """With the configuration of the compose file, but for the server's address and how often it is asked."""
    source = DEPLOY / "prometheus"
    config = yaml.safe_load((source / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    config["scrape_configs"] = [scrape for scrape in config["scrape_configs"] if "static_configs" in scrape]
    for scrape in config["scrape_configs"]:
        scrape["static_configs"] = [{"targets": [f"127.0.0.1:{api_port}"]}]
    target = folder / "prometheus"
    target.mkdir()
    (target / "prometheus.yml").write_text(yaml.safe_dump(config))
    for name in config["rule_files"]:
        shutil.copy(source / name, target)
    return [
        "prometheus",
        f"--config.file={target / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'prometheus-data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]


@contextmanager
def running(name: str, command: Sequence[str], folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process until the block ends; if it ends in an error, the last lines of its log are shown."""
    log_path = folder / f"{name}.log"
    print(f"Starting {name}: {' '.join(Path(word).name if word == sys.executable else word for word in command)}")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield process
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


def wait_for(
    what: str, is_there: Callable[[], bool], *, timeout_s: float, process: subprocess.Popen[bytes] | None = None
) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise Missing(f"{what} ended with exit code {process.returncode}")
        try:
            if is_there():
                return
        except (httpx2.TransportError, redis.ConnectionError):
            pass
        time.sleep(0.2)
    raise Missing(f"{what} was not there after {timeout_s:.0f} s")


def _answers(url: str) -> bool:
    return httpx2.get(url, timeout=5).status_code == 200


def make_all(api: str, prometheus: str) -> list[Made]:
    """A picture and a mesh in each round; between the rounds Prometheus gets to see what there was before."""
    made: list[Made] = []

    def is_scraped() -> bool:
        return ask(prometheus, "sum(elastic_requests_total)", default=0.0) == len(made)

    with httpx2.Client(base_url=api, timeout=REQUEST_S) as client:
        for _ in range(ROUNDS):
            made += [make_picture(client), make_mesh(client)]
            wait_for("the last request in Prometheus", is_scraped, timeout_s=SCRAPED_S)
    return made


def make_picture(client: httpx2.Client) -> Made:
    prompt = "a large red circle in the centre, on a plain light background"
    result = _result_of(
        client.post("/v1/images", json={"prompt": prompt, "seed": 7, "budget": {"preset": BUDGET}}), "a picture"
    )
    with Image.open(io.BytesIO(base64.b64decode(result["data"][0]["b64_json"]))) as picture:
        picture.load()
        return _made(result, f"{picture.format} of {picture.width}x{picture.height}")


def make_mesh(client: httpx2.Client) -> Made:
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
    return _made(result, f"{result['output_format'].upper()} of {len(mesh.faces)} faces")


def _result_of(response: httpx2.Response, what: str) -> dict[str, Any]:
    if response.status_code != 200:
        raise Missing(f"{what}: the server answered {response.status_code}: {response.text}")
    result: dict[str, Any] = response.json()
    return result


def _made(result: dict[str, Any], file: str) -> Made:
    return Made(result["id"], file, result["receipt"]["seconds"]["total"], result["receipt"]["compute_ratio"])


def check_redis(store: redis.Redis, made: Sequence[Made], folder: Path) -> None:
    num_keys = 0
    for job in made:
        keys = list(store.scan_iter(match=f"elastic:*{job.job_id}*"))
        if not keys:
            raise Missing(f"Redis has no key elastic:* of job {job.job_id}")
        num_keys += len(keys)
    print(f"Redis holds {num_keys} keys of these {len(made)} jobs")
    log_bytes = sum(path.stat().st_size for path in folder.glob("redis-data/appendonlydir/*.aof"))
    if not log_bytes:
        raise Missing("Redis wrote nothing to its append-only file")
    print(f"Redis's append-only files have {log_bytes:,} bytes")


def dashboard_queries(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """Title and query of every panel, Grafana's variables replaced."""
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
    """The answers to all queries. Raises Missing for those without a series that has a number."""
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
    """Prometheus evaluates all rules without an error, and on a healthy server none has gone off."""
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
    """The samples that Prometheus has for `expr` now."""
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
    """So that SIGTERM unwinds the stack, which stops the processes."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
