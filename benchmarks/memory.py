"""Does a server's memory stay flat over many jobs?

`python -m benchmarks.memory --jobs 2000` runs the real server with tiny-flux and tiny-hunyuan3d in this process. A few
threads call it over HTTP: calls that wait for one image and for two, jobs that are polled or followed, streams with
previews, cancelled jobs, clients that hang up, refusals, idempotency keys, and meshes. With `--redis`, jobs and results
are stored in a Redis started for the run.

Records and results expire within seconds here. After every 50 jobs, when all calls have ended and expired data has been
dropped, three sizes are measured: the memory of Python's objects (tracemalloc), of the process (resident pages), and of
Redis, with its number of keys. A line is fitted to each over the second half. The exit status is 1 if a line rises by
more than its limit:

- Python's objects: 500 bytes per job. A task, a future with its event, or a tenth of a job's record is more. With
  Redis, some 150 bytes are strings that pydantic caches from the JSON it reads, at most 16,384 of them.
- Redis: 100 bytes per job. Any additional key takes more.
- The process: 8,000 bytes per job. It includes tensors, which tracemalloc can't see: an image of the smallest size has
  12,288 bytes of colours, and 49,152 as float32. The allocator's fragments are the rest.
"""

import argparse
import base64
import gc
import os
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
from service.server import DrainingServer
from service.settings import Settings

MODELS = (Path("checkpoints/tiny-flux"), Path("checkpoints/tiny-hunyuan3d"))
EVERY = 50
LIMITS: Mapping[str, float] = {"tracemalloc": 500.0, "process": 8000.0, "redis": 100.0}
"""Bytes per job."""
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
def serving(redis_url: str | None) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    settings = Settings(
        port=0,
        models=MODELS,
        redis_url=redis_url,
        job_ttl_s=_TTL_S,
        result_ttl_s=_TTL_S,
        max_result_bytes=1_000_000,
        max_backlog_s=100_000,
        rate_limit=f"10000 per {_TTL_S:.0f} seconds",
    )
    dispatcher = build_dispatcher(
        settings, lambda: load_engine(list(MODELS), device="cpu", router_weights=settings.router_weights)
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


def settle(client: httpx2.Client) -> None:
    """Wait until data has expired, and make the stores drop it: they do so when they are used."""
    time.sleep(_TTL_S + 0.5)
    wait(client, 0)
    _answer(client.get("/metrics"), 200)
    gc.collect()


def sample(num_jobs: int, store: Any | None) -> TableRow:
    """One row of sizes. `store` is a client of the Redis of the run, if there is one."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    row: TableRow = {
        "jobs": num_jobs,
        "tracemalloc": tracemalloc.get_traced_memory()[0],
        "process": pages * os.sysconf("SC_PAGE_SIZE"),
    }
    if store is not None:
        keys = list(store.scan_iter(count=1000))  # this also makes Redis remove expired keys
        row |= {"redis": int(store.info("memory")["used_memory"]), "keys": len(keys)}
    return row


def slope(rows: Sequence[TableRow], name: str) -> float:
    """How much a column rises per job over the second half."""
    jobs, values = (np.array([float(row[key] or 0) for row in rows]) for key in ("jobs", name))
    is_late = jobs > jobs[-1] / 2
    return float(np.polyfit(jobs[is_late], values[is_late], 1)[0])


def run(num_jobs: int, redis_server: RedisServer | None) -> tuple[list[TableRow], Counter[str], list[str]]:
    """The samples, the number of calls of each kind, and where Python's memory grew in the second half."""
    torch.set_num_threads(1)
    calls = [call for call, count in MIX.items() for _ in range(count)]
    # Spread over the round, so that different kinds run at the same time.
    order = [calls[index * 7 % len(calls)] for index in range(len(calls))]
    rows: list[TableRow] = []
    made: Counter[str] = Counter()
    with ExitStack() as stack:
        store = None if redis_server is None else redis.Redis.from_url(redis_server.url)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        url = stack.enter_context(serving(None if redis_server is None else redis_server.url))
        client = stack.enter_context(httpx2.Client(base_url=url, timeout=120))
        clients = stack.enter_context(ThreadPoolExecutor(_NUM_CLIENTS))

        def call(number: int) -> None:
            order[number % EVERY](client, number)

        for first in (bar := tqdm(range(0, num_jobs, EVERY), desc=f"{EVERY} jobs each")):
            numbers = range(first, min(first + EVERY, num_jobs))
            list(clients.map(call, numbers))
            made.update(order[number % EVERY].__name__ for number in numbers)
            settle(client)
            rows.append(sample(numbers.stop, store))
            bar.set_postfix(rows[-1])
            if not (folder / "half").exists() and numbers.stop >= num_jobs / 2:
                # The snapshot takes memory that the process keeps, so it comes before the samples of the second half.
                tracemalloc.take_snapshot().dump(str(folder / "half"))
        grown = tracemalloc.take_snapshot().compare_to(tracemalloc.Snapshot.load(str(folder / "half")), "lineno")
    return rows, made, [str(difference) for difference in grown[:8]]


def measure(num_jobs: int, redis_server: RedisServer | None) -> tuple[dict[str, Any], bool]:
    """The result, and whether all sizes stay flat."""
    began = time.monotonic()
    rows, made, grown = run(num_jobs, redis_server)
    show("jobs in Redis" if redis_server else "jobs in memory", rows)
    slopes = {name: round(slope(rows, name), 4) for name in rows[0] if name != "jobs"}
    print("per job: " + ", ".join(f"{name} {rise:+.1f}" for name, rise in slopes.items()))
    faults = [
        f"{name} rises by {rise:.0f} bytes per job" for name, rise in slopes.items() if rise > LIMITS.get(name, 1)
    ]
    if faults:
        print("\n".join([*faults, "where Python's memory grew:", *grown]))
    result = {"seconds": round(time.monotonic() - began), "calls": dict(made), "slopes": slopes, "samples": rows}
    return result, not faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--redis", action="store_true", help="store jobs and results in a Redis started for the run")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    with ExitStack() as stack:
        redis_server = None
        if options.redis:
            redis_server = RedisServer(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            stack.callback(redis_server.kill)
        measured, is_flat = measure(options.jobs, redis_server)
    result = {
        "benchmark": "memory",
        "environment": environment(),
        "models": [model.name for model in MODELS],
        "jobs": options.jobs,
        "store": "redis" if options.redis else "memory",
        "limits": dict(LIMITS),
        **measured,
    }
    finish(result, options.json)
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
