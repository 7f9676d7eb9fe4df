"""Does a server's memory stay flat over many jobs?

`python -m benchmarks.memory --jobs 2000` runs the real server with tiny-flux and tiny-hunyuan3d in this process. A few
threads call it over HTTP: calls that wait for one image and for two, jobs that are polled or followed, streams with
previews, cancelled jobs, clients that hang up, refusals, idempotency keys, and meshes. With `--redis`, jobs and results
are stored in a Redis started for the run.

Records and results expire within seconds here. With `--default-ttls` they live as long as by default, an hour and a
day: then the run lets them expire by setting the store's clock forward, or by deleting the keys of Redis that have a
time to live. So what is left is what would stay for ever.

After every 50 jobs, when all calls have ended and expired data has been dropped, sizes are measured: the memory of
Python's objects (tracemalloc), of the process (resident pages), and of Redis, with its number of keys, and how many
descriptors the process has open. The first jobs (`--warm-up`) are not counted: they fill caches and the allocator's
pools. A line is fitted to each size over all others. The exit status is 1 if a line rises by more than its limit, even
less two standard errors of its slope:

- Python's objects: 500 bytes per job. A task, a future with its event, or a tenth of a job's record is more. With
  Redis, some 150 bytes are strings that pydantic caches from the JSON it reads, at most 16,384 of them.
- Open descriptors: one for 200 jobs.
- Redis: 100 bytes per job. Any additional key takes more.
- The process: 8,000 bytes per job. It includes tensors, which tracemalloc can't see: an image of the smallest size has
  12,288 bytes of colours, and 49,152 as float32. The allocator's fragments are the rest.
"""

import argparse
import base64
import gc
import math
import os
import re
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import numpy as np
import redis
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.processes import RedisServer
from benchmarks.table import TableRow, finish, show
from models.zoo import load_engine
from service.api.connections import ServerConfig
from service.app import build_dispatcher, create_app
from service.jobs.redis_operations import PREFIX
from service.server import DrainingServer
from service.settings import Settings

MODELS = (Path("checkpoints/tiny-flux"), Path("checkpoints/tiny-hunyuan3d"))
EVERY = 50
MIN_SAMPLES = 4
"""Fewer do not tell a line's slope from its error."""
LIMITS: Mapping[str, float] = {"tracemalloc": 500.0, "process": 8000.0, "descriptors": 0.005, "redis": 100.0}
"""Bytes per job, and open descriptors per job."""
_NUM_CLIENTS = 4
_TTL_S = 6.0
_START_S = 120
_IMAGE: Mapping[str, Any] = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 2}

Call = Callable[[httpx2.Client, int], None]


def _answer(response: httpx2.Response, status: int) -> httpx2.Response:
    if response.status_code != status:
        raise RuntimeError(f"{response.request.url} answered {response.status_code}: {response.text[:500]}")
    return response


def _submit(client: httpx2.Client, **fields: Any) -> str:
    response = client.post("/v1/images", json={**_IMAGE, **fields}, headers={"Prefer": "respond-async"})
    return str(_answer(response, 202).json()["id"])


def wait(client: httpx2.Client, number: int) -> None:
    _answer(client.post("/v1/images", json={**_IMAGE, "seed": number}), 200)


def wait_for_two(client: httpx2.Client, number: int) -> None:
    _answer(client.post("/v1/images", json={**_IMAGE, "seed": number, "n": 2, "output_format": "webp"}), 200)


def poll(client: httpx2.Client, number: int) -> None:
    path = f"/v1/jobs/{_submit(client, seed=number, trace=True)}"
    while _answer(client.get(path), 200).json()["status"] in ("queued", "running"):
        time.sleep(0.05)
    _answer(client.get(f"{path}/content"), 200)


def follow(client: httpx2.Client, number: int) -> None:
    events = _answer(client.get(f"/v1/jobs/{_submit(client, seed=number)}/events"), 200).text
    if "image_generation.completed" not in events:
        raise RuntimeError(events[-500:])


def stream(client: httpx2.Client, number: int) -> None:
    body = {**_IMAGE, "seed": number, "num_inference_steps": 4, "stream": True, "partial_images": 2}
    events = _answer(client.post("/v1/images", json=body), 200).text
    if events.count("event: image_generation.partial_image") != 2:
        raise RuntimeError(events[-500:])


def cancel(client: httpx2.Client, number: int) -> None:
    job_id = _submit(client, seed=number, num_inference_steps=50)
    _answer(client.delete(f"/v1/jobs/{job_id}"), 200)


def hang_up(client: httpx2.Client, number: int) -> None:
    body = {**_IMAGE, "seed": number, "num_inference_steps": 50, "stream": True}
    with client.stream("POST", "/v1/images", json=body) as response:
        next(response.iter_lines())


def be_refused(client: httpx2.Client, number: int) -> None:
    _answer(client.post("/v1/images", json={**_IMAGE, "size": f"{number}x7"}), 422)
    _answer(client.post("/v1/images", json={**_IMAGE, "model": f"model-{number}"}), 404)
    _answer(client.post("/v1/images", content=b"{", headers={"Content-Type": "application/json"}), 400)
    _answer(client.get(f"/v1/jobs/job-{number}"), 404)
    _answer(client.get(f"/page-{number}"), 404)


def come_again(client: httpx2.Client, number: int) -> None:
    headers = {"Idempotency-Key": f"key-{number}"}
    body = {**_IMAGE, "seed": number}
    first = _answer(client.post("/v1/images", json=body, headers={**headers, "Prefer": "respond-async"}), 202)
    _answer(client.post("/v1/images", json={**body, "n": 2}, headers=headers), 422)
    again = _answer(client.post("/v1/images", json=body, headers=headers), 200)
    if first.json()["id"] != again.json()["id"]:
        raise RuntimeError("one idempotency key made two jobs")


def make_mesh(client: httpx2.Client, number: int) -> None:
    body = {
        "input_image": _image(),
        "seed": number,
        "num_inference_steps": 3,
        "octree_resolution": 16,
        "budget": {"preset": "draft"},
    }
    response = client.post("/v1/meshes", json=body)
    if response.status_code != 500:  # after so few steps, the shape may have no surface, which is answered with 500
        _answer(response, 200)


def _image() -> str:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((12, 12, 52, 52), fill="grey")
    file = BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# How often each kind of call comes in a round of EVERY jobs.
MIX: Mapping[Call, int] = {
    wait: 10,
    wait_for_two: 2,
    poll: 6,
    follow: 5,
    stream: 5,
    cancel: 9,
    hang_up: 6,
    be_refused: 4,
    come_again: 2,
    make_mesh: 1,
}


@contextmanager
def serving(redis_url: str | None, ttls: Mapping[str, Any], clock: Callable[[], float]) -> Iterator[str]:
    """The address of a server in a thread of this process. `ttls` has settings; `clock` is its store's."""
    settings = Settings(
        port=0,
        models=MODELS,
        redis_url=redis_url,
        **ttls,
        max_result_bytes=1_000_000,
        max_backlog_s=100_000,
        rate_limit=f"10000 per {_TTL_S:.0f} seconds",
    )
    dispatcher = build_dispatcher(
        settings,
        lambda: load_engine(list(MODELS), device="cpu", router_weights=settings.router_weights),
        clock=clock,
    )
    dispatcher.worker.start()
    app = create_app(settings, dispatcher)
    server = DrainingServer(ServerConfig(app, settings), dispatcher)
    thread = Thread(target=server.run, name="server")
    thread.start()
    deadline = time.monotonic() + _START_S
    while not server.started:
        if time.monotonic() > deadline:
            raise RuntimeError("the server does not answer")
        time.sleep(0.05)
    try:
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


class Expiry:
    """How data expires: after seconds, or, with `is_default`, when the time to live of all data is made to pass."""

    def __init__(self, store: Any | None, *, is_default: bool) -> None:
        self.ttls: Mapping[str, float] = {} if is_default else {"job_ttl_s": _TTL_S, "result_ttl_s": _TTL_S}
        self._store = store
        self._is_default = is_default
        self._passed_s = 0.0

    def clock(self) -> float:
        return time.time() + self._passed_s

    def expire(self) -> None:
        time.sleep(_TTL_S + 0.5)  # rate limits are counted by the real time
        if self._is_default and self._store is None:
            self._passed_s += 2 * Settings().job_ttl_s
        elif self._is_default and self._store is not None:
            for key in [*self._store.scan_iter(count=1000)]:
                if self._store.pttl(key) >= 0:
                    self._store.delete(key)
            # The list of results has no time to live; what is older than a result's is dropped with the next result.
            for result in self._store.zrange(f"{PREFIX}results", 0, -1):
                self._store.zincrby(f"{PREFIX}results", -2000 * Settings().result_ttl_s, result)


def settle(client: httpx2.Client, expiry: Expiry) -> None:
    """Wait until all jobs have ended and data has expired. The stores drop it when they are used, so use them."""
    deadline = time.monotonic() + _START_S
    while num_unfinished(_answer(client.get("/metrics"), 200).text):
        if time.monotonic() > deadline:
            raise RuntimeError("a job does not end, though no client waits for it")
        time.sleep(0.1)
    expiry.expire()
    wait(client, 0)
    _answer(client.get("/metrics"), 200)
    gc.collect()


def num_unfinished(metrics: str) -> float:
    """How many jobs are queued or running, from the text of the metrics."""
    lines = re.findall(r"^elastic_requests_(?:running|waiting)\{.*\} (\S+)$", metrics, re.MULTILINE)
    return sum(map(float, lines))


def sample(num_jobs: int, store: Any | None) -> TableRow:
    """One row of sizes. `store` is a client of the Redis of the run, if there is one."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    row: TableRow = {
        "jobs": num_jobs,
        "tracemalloc": tracemalloc.get_traced_memory()[0],
        "process": pages * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }
    if store is not None:
        keys = list(store.scan_iter(count=1000))  # this also makes Redis remove expired keys
        row |= {"redis": int(store.info("memory")["used_memory"]), "keys": len(keys)}
    return row


def slope(rows: Sequence[TableRow], name: str) -> tuple[float, float]:
    """How much a column rises per job, and the standard error of that."""
    jobs, values = (np.array([float(row[key] or 0) for row in rows]) for key in ("jobs", name))
    (rise, _), covariances = np.polyfit(jobs, values, 1, cov=True)
    return float(rise), float(np.sqrt(covariances[0, 0]))


def run(
    num_jobs: int, redis_server: RedisServer | None, *, num_warm_up: int, has_default_ttls: bool
) -> tuple[list[TableRow], Counter[str], list[str]]:
    """The samples after the warm-up, the number of calls of each kind, and where Python's memory grew between them."""
    torch.set_num_threads(1)
    calls = [call for call, count in MIX.items() for _ in range(count)]
    # Spread over the round, so that different kinds run at the same time.
    order = [calls[index * 7 % len(calls)] for index in range(len(calls))]
    rows: list[TableRow] = []
    made: Counter[str] = Counter()
    with ExitStack() as stack:
        store = None if redis_server is None else redis.Redis.from_url(redis_server.url)
        expiry = Expiry(store, is_default=has_default_ttls)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        url = stack.enter_context(
            serving(None if redis_server is None else redis_server.url, expiry.ttls, expiry.clock)
        )
        client = stack.enter_context(httpx2.Client(base_url=url, timeout=120))
        clients = stack.enter_context(ThreadPoolExecutor(_NUM_CLIENTS))

        def call(number: int) -> None:
            order[number % EVERY](client, number)

        for first in (bar := tqdm(range(0, num_warm_up + num_jobs, EVERY), desc=f"{EVERY} jobs each")):
            list(clients.map(call, range(first, first + EVERY)))
            settle(client, expiry)
            row = sample(first + EVERY, store)
            bar.set_postfix(row)
            if first + EVERY < num_warm_up:
                continue
            if (folder / "warm").exists():
                made.update(order[index].__name__ for index in range(EVERY))
                rows.append(row)
            else:
                # The snapshot takes memory that the process keeps, so it comes before the samples that count.
                tracemalloc.take_snapshot().dump(str(folder / "warm"))
        grown = tracemalloc.take_snapshot().compare_to(tracemalloc.Snapshot.load(str(folder / "warm")), "lineno")
    return rows, made, [str(difference) for difference in grown[:8]]


def judge(rows: Sequence[TableRow]) -> tuple[dict[str, float], list[str]]:
    """How much each size rises per job, and those that rise by more than their limit."""
    slopes = {name: slope(rows, name) for name in rows[0] if name != "jobs"}
    faults = [
        f"{name} rises by {rise:.4g} per job, give or take {error:.2g}"
        for name, (rise, error) in slopes.items()
        if rise - 2 * error > LIMITS.get(name, 1)
    ]
    return {name: round(rise, 4) for name, (rise, _) in slopes.items()}, faults


def measure(
    num_jobs: int, redis_server: RedisServer | None, *, num_warm_up: int, has_default_ttls: bool
) -> tuple[dict[str, Any], bool]:
    """The result, and whether all sizes stay flat."""
    began = time.monotonic()
    rows, made, grown = run(num_jobs, redis_server, num_warm_up=num_warm_up, has_default_ttls=has_default_ttls)
    show("jobs in Redis" if redis_server else "jobs in memory", rows)
    slopes, faults = judge(rows)
    print("per job: " + ", ".join(f"{name} {rise:+.4g}" for name, rise in slopes.items()))
    if faults:
        print("\n".join([*faults, "where Python's memory grew:", *grown]))
    result = {"seconds": round(time.monotonic() - began), "calls": dict(made), "slopes": slopes, "samples": rows}
    return result, not faults


def _rounds(text: str) -> int:
    """A number of jobs, rounded up to whole rounds."""
    return math.ceil(int(text) / EVERY) * EVERY


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--jobs", type=_rounds, default=2000, help=f"how many are counted, in rounds of {EVERY}")
    parser.add_argument("--warm-up", type=_rounds, default=300, help="how many come before them")
    parser.add_argument("--redis", action="store_true", help="store jobs and results in a Redis started for the run")
    parser.add_argument("--default-ttls", action="store_true", help="keep data as long as by default")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if options.jobs < MIN_SAMPLES * EVERY or options.warm_up < EVERY:
        parser.error(
            f"at least {MIN_SAMPLES * EVERY} jobs and a warm-up of {EVERY} are needed to tell a rise from noise"
        )
    with ExitStack() as stack:
        redis_server = None
        if options.redis:
            redis_server = RedisServer(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            stack.callback(redis_server.kill)
        measured, is_flat = measure(
            options.jobs, redis_server, num_warm_up=options.warm_up, has_default_ttls=options.default_ttls
        )
    result = {
        "benchmark": "memory",
        "environment": environment(),
        "models": [model.name for model in MODELS],
        "jobs": options.jobs,
        "warm_up": options.warm_up,
        "store": "redis" if options.redis else "memory",
        "ttls": "default" if options.default_ttls else f"{_TTL_S:g} s",
        "limits": dict(LIMITS),
        **measured,
    }
    finish(result, options.json)
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
