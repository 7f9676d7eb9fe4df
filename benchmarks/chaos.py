"""Is any job lost, run twice or mixed up when servers, workers and Redis die at random moments?

`python -m benchmarks.chaos --jobs 300` starts a Redis with an append-only file, and two servers and two workers that
share it. It sends jobs to the servers, each with its own seed, budget and idempotency key. A call that breaks off is
sent again, to any server that answers. Meanwhile one process after another is killed (SIGKILL) and started again. In
the end every accepted job must

- have ended exactly once: it succeeded, or it failed with a reason;
- have the image that its seed gives alone, in an engine in this process.

Redis must hold no job that no client was told of, and nothing queued, running or leased. Images are compared by their
8-bit colours. Batches of other sizes round differently, so a difference of 2 in 255 is allowed, and reported. The exit
status is 1 if any of this does not hold.
"""

import argparse
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol

import httpx2
import numpy as np
import redis
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.processes import RedisServer
from benchmarks.table import finish
from examples.server_process import ElasticDit
from models.card import ImageCard
from models.engine import Engine
from models.zoo import load_engine
from service.api.parsing import parse_image_body
from service.api.schemas import ImageBody
from service.budget import BudgetBody
from service.jobs.job import JobStatus
from service.jobs.redis import PREFIX

MODEL = Path("checkpoints/tiny-flux")
MAX_DIFFERENCE = 2
_BUDGETS: Sequence[dict[str, Any]] = (
    {"preset": "exact"},
    {"preset": "balanced"},
    {"preset": "draft"},
    {"quality": 0.9},
)
_PROMPTS = ("a large red circle in the centre", "a small blue square at the top left", "a green ring, a white cross")
_NUM_CLIENTS = 8
_LEASE_S = 3.0
_LEASES_END_S = 60.0  # many times a lease, for a loaded machine
_DOWN_S = (0.1, 2.0)


class Victim(Protocol):
    def kill(self) -> None: ...
    def start(self) -> None: ...


@dataclass
class Findings:
    """How all jobs ended, and what was wrong."""

    statuses: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    largest_difference: int = 0
    seconds: float = 0.0


def random_bodies(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "prompt": rng.choice(_PROMPTS),
            "seed": rng.randrange(2**32),
            "budget": rng.choice(_BUDGETS),
            "num_inference_steps": rng.randint(4, 12),
            "priority": rng.choice(["low", "normal", "high"]),
        }
        for _ in range(count)
    ]


def images(engine: Engine, bodies: Sequence[dict[str, Any]]) -> Iterator[NDArray[np.uint8]]:
    """The image of each body, generated alone."""
    card = engine.cards[MODEL.name]
    assert isinstance(card, ImageCard)
    for body in bodies:
        order = parse_image_body(
            ImageBody.model_validate(body), card, default_budget=BudgetBody(quality=0.9), random_seed=0
        )
        state = engine.start(order.requests[0])
        while not state.is_done:
            engine.step([state])
        pixels = engine.finish(state)
        assert isinstance(pixels, np.ndarray)
        yield pixels


class Cluster:
    """Redis, servers and workers. Any of them may be killed."""

    def __init__(self, folder: Path, num_servers: int, num_workers: int) -> None:
        self.redis = RedisServer(folder)
        environment = {
            "ELASTIC_REDIS_URL": self.redis.url,
            "ELASTIC_MODELS": str(MODEL),
            "ELASTIC_LEASE_S": str(_LEASE_S),
            "ELASTIC_MAX_ATTEMPTS": "10",
            "ELASTIC_MAX_BACKLOG_S": "100000",
            "OMP_NUM_THREADS": "1",
        }
        self.servers = [ElasticDit("serve", folder / f"server{n}.log", **environment) for n in range(num_servers)]
        self.workers = [ElasticDit("worker", folder / f"worker{n}.log", **environment) for n in range(num_workers)]

    def wait_until_ready(self) -> None:
        for process in (*self.servers, *self.workers):
            process.wait_until_ready()

    def call(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """The first answer of any server other than 503; retries until there is one."""
        while True:
            for server in self.servers:
                if server.url:
                    try:
                        response = httpx2.request(method, server.url + path, timeout=20, **options)
                    except httpx2.TransportError:
                        continue
                    if response.status_code != 503:
                        return response
            time.sleep(0.1)

    def close(self) -> None:
        everything: Sequence[Victim] = (*self.servers, *self.workers, self.redis)
        for process in everything:
            process.kill()


@contextmanager
def killing(cluster: Cluster, seed: int, mean_s: float, max_kills: float, kills: Counter[str]) -> Iterator[None]:
    """Kill a running process every `mean_s` seconds on average, at most `max_kills` times, and start it again soon."""
    rng, is_over = random.Random(seed), Event()

    def kill() -> None:
        while kills.total() < max_kills and not is_over.wait(rng.expovariate(1 / mean_s)):
            kind = rng.choice(["server", "worker", "redis"])
            if kind == "redis":
                victims: Sequence[Victim] = [cluster.redis]
            else:
                everyone = cluster.servers if kind == "server" else cluster.workers
                victims = [process for process in everyone if process.url]
            if not victims:
                continue
            victim = rng.choice(victims)
            victim.kill()
            kills[kind] += 1
            is_over.wait(rng.uniform(*_DOWN_S))
            victim.start()
            if isinstance(victim, ElasticDit):
                Thread(target=victim.wait_until_ready, daemon=True).start()

    thread = Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def run(
    num_jobs: int, *, seed: int, mean_s: float, num_servers: int, num_workers: int, max_kills: float = math.inf
) -> Findings:
    """Send the jobs while processes are killed, then check every job and Redis.

    `max_kills` bounds the time on a slow machine.
    """
    torch.set_num_threads(1)
    bodies, findings = random_bodies(num_jobs, seed), Findings()
    engine = load_engine([MODEL], device="cpu", router_weights=Path("router_weights"))
    expected = list(tqdm(images(engine, bodies), total=num_jobs, desc="generated alone"))
    with ExitStack() as stack:
        cluster = Cluster(Path(stack.enter_context(tempfile.TemporaryDirectory())), num_servers, num_workers)
        stack.callback(cluster.close)
        cluster.wait_until_ready()
        began = time.monotonic()
        with killing(cluster, seed, mean_s, max_kills, findings.kills), ThreadPoolExecutor(_NUM_CLIENTS) as clients:
            submitted = clients.map(partial(submit, cluster), range(num_jobs), bodies)
            ids = list(tqdm(submitted, total=num_jobs, desc="accepted"))
            jobs = list(tqdm(clients.map(partial(wait, cluster), ids), total=num_jobs, desc="ended"))
        findings.seconds = time.monotonic() - began
        for number, job in enumerate(jobs):
            _check_job(cluster, number, ids[number], job, expected[number], findings)
        _inspect_redis(redis.Redis.from_url(cluster.redis.url), ids, findings)
    return findings


def submit(cluster: Cluster, number: int, body: Mapping[str, Any]) -> str:
    """The id of the accepted job."""
    headers = {"Prefer": "respond-async", "Idempotency-Key": f"chaos-{number}"}
    response = cluster.call("POST", "/v1/images", json=body, headers=headers)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def wait(cluster: Cluster, job_id: str) -> dict[str, Any]:
    """The job's record once it has ended. A job that no server knows has the status "lost"."""
    while True:
        response = cluster.call("GET", f"/v1/jobs/{job_id}")
        if response.status_code != 200:
            return {"status": f"lost ({response.status_code})", "error": None}
        job: dict[str, Any] = response.json()
        if JobStatus(job["status"]).is_terminal:
            return job
        time.sleep(0.5)


def _check_job(
    cluster: Cluster, number: int, job_id: str, job: Mapping[str, Any], expected: NDArray[np.uint8], findings: Findings
) -> None:
    findings.statuses[job["status"]] += 1
    if job["status"] == JobStatus.SUCCEEDED:
        content = cluster.call("GET", f"/v1/jobs/{job_id}/content").content
        _compare(number, content, expected, findings)
    elif job["status"] == JobStatus.FAILED and job["error"]:
        findings.reasons[job["error"]["message"].replace(job_id, "…")] += 1
    else:
        findings.faults.append(f"job {number} is {job['status']}")


def _compare(number: int, content: bytes, expected: NDArray[np.uint8], findings: Findings) -> None:
    with Image.open(BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
    difference = int(np.abs(pixels - expected).max()) if pixels.shape == expected.shape else 255
    findings.largest_difference = max(findings.largest_difference, difference)
    if difference > MAX_DIFFERENCE:
        findings.faults.append(f"the image of job {number} differs by {difference} from that of its seed")


def _inspect_redis(client: Any, ids: Sequence[str], findings: Findings) -> None:
    deadline = time.monotonic() + _LEASES_END_S
    while client.zcard(f"{PREFIX}leases") and time.monotonic() < deadline:
        time.sleep(0.1)
    for name in ("queue", "leases", "live"):
        if left := client.exists(f"{PREFIX}{name}"):
            findings.faults.append(f"Redis still holds {left} {name}")
    known = {key.decode().removeprefix(f"{PREFIX}job:") for key in client.scan_iter(f"{PREFIX}job:*", _type="hash")}
    for job_id in known.symmetric_difference(ids):
        findings.faults.append(f"job {job_id} is in Redis or was accepted, but not both")
    if len(set(ids)) < len(ids):
        findings.faults.append("two calls with different keys were given the same job")
    for job_id in known & {*ids}:
        events = [fields[b"name"] for _, fields in client.xrange(f"{PREFIX}job:{job_id}:events")]
        if events.count(b"job.ended") != 1:
            findings.faults.append(f"job {job_id} ended {events.count(b'job.ended')} times")
        findings.attempts[int(client.hget(f"{PREFIX}job:{job_id}", "attempts") or 0)] += 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mean-s", type=float, default=6.0, help="seconds between two kills, on average")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    findings = run(
        options.jobs,
        seed=options.seed,
        mean_s=options.mean_s,
        num_servers=options.servers,
        num_workers=options.workers,
    )
    for name, tally in (
        ("jobs", findings.statuses),
        ("kills", findings.kills),
        ("workers that claimed a job", findings.attempts),
        ("reasons of failures", findings.reasons),
    ):
        print(f"{name}: " + (", ".join(f"{key}: {count}" for key, count in sorted(tally.items())) or "none"))
    print(f"largest difference of an image: {findings.largest_difference} of 255")
    print("\n".join(findings.faults) or "no job was lost, run twice or mixed up")
    result = {
        "benchmark": "chaos",
        "environment": environment(),
        "seed": options.seed,
        "servers": options.servers,
        "workers": options.workers,
        "jobs": dict(findings.statuses),
        "kills": dict(findings.kills),
        "attempts": {str(count): jobs for count, jobs in findings.attempts.items()},
        "failures": dict(findings.reasons),
        "largest_difference": findings.largest_difference,
        "seconds": round(findings.seconds, 1),
        "faults": findings.faults,
    }
    finish(result, options.json)
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(main())
