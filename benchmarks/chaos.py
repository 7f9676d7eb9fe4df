"""Is any job lost, made twice or mixed up when servers, workers and Redis die at random moments?

`python -m benchmarks.chaos --jobs 300` starts a Redis with an append-only file, two servers and two workers that share
it, and sends jobs to the servers, each with a seed, a budget and an idempotency key of its own; a call that breaks off
is sent again, to whichever server answers. Meanwhile one process after another is killed (SIGKILL) and started again.
In the end every job that a server accepted must have

- ended, exactly once: succeeded, or failed with a reason
- the picture that its seed gives when it is made alone, by an engine of its own in this process

and Redis must hold no job that nobody was told of, and nothing queued, running or leased. Pictures are compared as
bytes of the colours: batches of other sizes round differently, so a difference of 2 in 255 is allowed, and reported.
Exit status 1 if anything of it does not hold.
"""

import argparse
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
from benchmarks.processes import ElasticDit, RedisServer
from benchmarks.table import finish
from models.card import ImageCard
from models.engine import Engine
from models.request import QualityBudget
from models.zoo import load_engine
from service.api.parsing import parse_requests
from service.api.schemas import ImageBody
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
class Outcome:
    """What was found of all jobs, in the end."""

    statuses: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    largest_difference: int = 0
    seconds: float = 0.0


def bodies(count: int, seed: int) -> list[dict[str, Any]]:
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


def pictures(engine: Engine, asked: Sequence[dict[str, Any]]) -> Iterator[NDArray[np.uint8]]:
    """What each body gives, made alone."""
    card = engine.cards[MODEL.name]
    assert isinstance(card, ImageCard)
    for body in asked:
        (request,) = parse_requests(
            ImageBody.model_validate(body), card, default_budget=QualityBudget(0.9), random_seed=0
        )
        state = engine.start(request)
        while not state.is_done:
            engine.step([state])
        pixels = engine.finish(state)
        assert isinstance(pixels, np.ndarray)
        yield pixels


class Cluster:
    """Redis, servers and workers, each of which may be killed."""

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
        """The first answer of any server that is no refusal for want of a store or of time."""
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
    """Kill a process that is up every `mean_s` seconds on average, at most `max_kills` times; start it again soon."""
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
) -> Outcome:
    """Send the jobs, kill processes meanwhile, and check every job. `max_kills` bounds the time on a slow machine."""
    torch.set_num_threads(1)
    asked, outcome = bodies(num_jobs, seed), Outcome()
    engine = load_engine([MODEL], device="cpu", router_weights=Path("router_weights"))
    expected = list(tqdm(pictures(engine, asked), total=num_jobs, desc="made alone"))
    with ExitStack() as stack:
        cluster = Cluster(Path(stack.enter_context(tempfile.TemporaryDirectory())), num_servers, num_workers)
        stack.callback(cluster.close)
        cluster.wait_until_ready()
        began = time.monotonic()
        with killing(cluster, seed, mean_s, max_kills, outcome.kills), ThreadPoolExecutor(_NUM_CLIENTS) as clients:

            def submit(number: int) -> str:
                headers = {"Prefer": "respond-async", "Idempotency-Key": f"chaos-{number}"}
                response = cluster.call("POST", "/v1/images", json=asked[number], headers=headers)
                assert response.status_code == 202, response.text
                return str(response.json()["id"])

            def wait(job_id: str) -> dict[str, Any]:
                while True:
                    response = cluster.call("GET", f"/v1/jobs/{job_id}")
                    if response.status_code != 200:
                        return {"status": f"lost ({response.status_code})", "error": None}
                    job: dict[str, Any] = response.json()
                    if JobStatus(job["status"]).is_terminal:
                        return job
                    time.sleep(0.5)

            submitted = clients.map(submit, range(num_jobs))
            ids = list(tqdm(submitted, total=num_jobs, desc="accepted"))
            jobs = list(tqdm(clients.map(wait, ids), total=num_jobs, desc="ended"))
        outcome.seconds = time.monotonic() - began
        for number, (job_id, job) in enumerate(zip(ids, jobs, strict=True)):
            outcome.statuses[job["status"]] += 1
            if job["status"] == JobStatus.SUCCEEDED:
                content = cluster.call("GET", f"/v1/jobs/{job_id}/content").content
                _compare(number, content, expected[number], outcome)
            elif job["status"] == JobStatus.FAILED and job["error"]:
                outcome.reasons[job["error"]["message"].replace(job_id, "…")] += 1
            else:
                outcome.faults.append(f"job {number} is {job['status']}")
        _look_into_redis(redis.Redis.from_url(cluster.redis.url), ids, outcome)
    return outcome


def _compare(number: int, content: bytes, expected: NDArray[np.uint8], outcome: Outcome) -> None:
    with Image.open(BytesIO(content)) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.int16)
    difference = int(np.abs(pixels - expected).max()) if pixels.shape == expected.shape else 255
    outcome.largest_difference = max(outcome.largest_difference, difference)
    if difference > MAX_DIFFERENCE:
        outcome.faults.append(f"the picture of job {number} is not its own: it differs by {difference}")


def _look_into_redis(client: Any, ids: Sequence[str], outcome: Outcome) -> None:
    deadline = time.monotonic() + _LEASES_END_S
    while client.zcard(f"{PREFIX}leases") and time.monotonic() < deadline:
        time.sleep(0.1)
    for name in ("queue", "leases", "live"):
        if left := client.exists(f"{PREFIX}{name}"):
            outcome.faults.append(f"Redis still holds {left} {name}")
    known = {key.decode().removeprefix(f"{PREFIX}job:") for key in client.scan_iter(f"{PREFIX}job:*", _type="hash")}
    for job_id in known.symmetric_difference(ids):
        outcome.faults.append(f"job {job_id} is in Redis or was accepted, but not both")
    if len(set(ids)) < len(ids):
        outcome.faults.append("two calls with different keys were given the same job")
    for job_id in known & {*ids}:
        events = [fields[b"name"] for _, fields in client.xrange(f"{PREFIX}job:{job_id}:events")]
        if events.count(b"job.ended") != 1:
            outcome.faults.append(f"job {job_id} ended {events.count(b'job.ended')} times")
        outcome.attempts[int(client.hget(f"{PREFIX}job:{job_id}", "attempts") or 0)] += 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mean-s", type=float, default=6.0, help="seconds between two kills, on average")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    outcome = run(
        options.jobs,
        seed=options.seed,
        mean_s=options.mean_s,
        num_servers=options.servers,
        num_workers=options.workers,
    )
    for name, tally in (
        ("jobs", outcome.statuses),
        ("kills", outcome.kills),
        ("workers that claimed a job", outcome.attempts),
        ("reasons of failures", outcome.reasons),
    ):
        print(f"{name}: " + (", ".join(f"{key}: {count}" for key, count in sorted(tally.items())) or "none"))
    print(f"largest difference of a picture: {outcome.largest_difference} of 255")
    print("\n".join(outcome.faults) or "nothing lost, nothing twice, nothing mixed up")
    result = {
        "benchmark": "chaos",
        "environment": environment(),
        "seed": options.seed,
        "servers": options.servers,
        "workers": options.workers,
        "jobs": dict(outcome.statuses),
        "kills": dict(outcome.kills),
        "attempts": {str(count): jobs for count, jobs in outcome.attempts.items()},
        "failures": dict(outcome.reasons),
        "largest_difference": outcome.largest_difference,
        "seconds": round(outcome.seconds, 1),
        "faults": outcome.faults,
    }
    finish(result, options.json)
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
