"""Does a server stay quick for those who are in a hurry while others ask for too much?

`python -m benchmarks.pressure` runs the real server with tiny-flux and tiny-hunyuan3d, and calls it from this process.
One client draws images of high priority, one after the other, first on a quiet server and then on one that is pressed
by three others at once:

- meshes at `octree_resolution` 512, one after the other,
- bodies of 29 MB that are refused, one every two seconds,
- three times as many images as the server can draw, at even intervals, of normal priority; most are refused.

`/healthz` is asked every 50 ms. `image_s` is the median time of an image of high priority, `over_quiet` that over the
quiet one. A wrong answer to one of the others sets the exit status to 1, and one to an image of high priority or to
`/healthz` ends the run.
"""

import argparse
import base64
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread
from typing import Self

import httpx2
import numpy as np

from benchmarks.environment import environment
from benchmarks.table import TableRow, finish, show
from examples.server_process import ElasticDit

_MODELS = "tiny-flux,tiny-hunyuan3d"
_IMAGE = Path("models/calibration_samples/pictures/00.png")
_HEALTH_S = 0.05
_ANSWER_S = 300.0
_BODY_BYTES, _BODY_S = 29_000_000, 2.0
_OVERLOAD = 3.0
_BACKLOG_S = 60.0
"""Of the server, so that it is soon full."""
_REFUSED, _AGAIN_S = 503, 1.0
"""The answer of a server that has enough to do, and when to call again."""
_WARM_UP_S = 10.0
_ANSWERS = {"meshes": {200, _REFUSED}, "large bodies": {413}, "images": {202, _REFUSED}}
"""The statuses that are right."""

Call = Callable[[httpx2.Client], httpx2.Response]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each phase")
    parser.add_argument("--image", type=Path, default=_IMAGE, help="of the meshes")
    parser.add_argument("--budget", default="balanced", help="preset of all images")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def draw(priority: str, budget: str, **headers: str) -> Call:
    body = {"prompt": "a red circle above a blue square", "priority": priority, "budget": {"preset": budget}}
    return lambda client: client.post("/v1/images", json=body, headers=headers)


class Presser:
    """Calls again and again in a thread, and counts the answers by status. With `every_s`, at even intervals."""

    def __init__(self, url: str, call: Call, every_s: float = 0.0) -> None:
        self.answers: Counter[int] = Counter()
        self._url, self._call, self._every_s = url, call, every_s
        self._ends = Event()
        self._thread = Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx2.Client(base_url=self._url, timeout=_ANSWER_S) as client:
            due = time.monotonic()
            while not self._ends.wait(max(0.0, due - time.monotonic())):
                status = self._call(client).status_code
                self.answers[status] += 1
                due += self._every_s or (_AGAIN_S if status == _REFUSED else 0.0)


def measure(url: str, budget: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of the calls to `/healthz` and of images of high priority, made for `seconds`. Runs in its own process.

    Raises RuntimeError if one is refused.
    """
    ends = time.monotonic() + seconds
    times: dict[str, list[float]] = {"healthz": [], "image": []}

    def repeat(name: str, call: Call, pause_s: float) -> None:
        with httpx2.Client(base_url=url, timeout=_ANSWER_S) as client:
            while time.monotonic() < ends:
                began = time.monotonic()
                response = call(client)
                if response.is_error:  # not HTTPStatusError, which does not survive the way to another process
                    raise RuntimeError(f"{response.request.url} answered {response.status_code}: {response.text}")
                times[name].append(time.monotonic() - began)
                time.sleep(pause_s)

    with ThreadPoolExecutor() as pool:
        health = pool.submit(repeat, "healthz", lambda client: client.get("/healthz"), _HEALTH_S)
        images = pool.submit(repeat, "image", draw("high", budget), 0.0)
        health.result()
        images.result()
    return times


def row_of(phase: str, times: Mapping[str, list[float]], quiet_s: float) -> TableRow:
    image_s = statistics.median(times["image"])
    return {
        "phase": phase,
        "images": len(times["image"]),
        "image_s": image_s,
        "image_p95_s": float(np.percentile(times["image"], 95)),
        "over_quiet": image_s / quiet_s,
        "healthz_s": statistics.median(times["healthz"]),
        "healthz_p99_s": float(np.percentile(times["healthz"], 99)),
        "healthz_most_s": max(times["healthz"]),
    }


def main() -> None:
    arguments = parse_arguments()
    mesh = {"input_image": base64.b64encode(arguments.image.read_bytes()).decode(), "octree_resolution": 512}
    large = b'{"prompt": "' + b"x" * _BODY_BYTES + b'"}'
    as_json = {"Content-Type": "application/json"}
    options = {"ELASTIC_MODELS": _MODELS, "ELASTIC_MAX_BACKLOG_S": str(_BACKLOG_S)}
    with (
        tempfile.TemporaryDirectory() as folder,
        ElasticDit("serve", Path(folder) / "server.log", **options) as server,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process,
    ):
        url = server.wait_until_ready()
        process.submit(measure, url, arguments.budget, _WARM_UP_S).result()
        quiet = process.submit(measure, url, arguments.budget, arguments.seconds).result()
        quiet_s = statistics.median(quiet["image"])
        pressers = {
            "meshes": Presser(url, lambda client: client.post("/v1/meshes", json=mesh)),
            "large bodies": Presser(
                url, lambda client: client.post("/v1/meshes", content=large, headers=as_json), _BODY_S
            ),
            "images": Presser(url, draw("normal", arguments.budget, Prefer="respond-async"), quiet_s / _OVERLOAD),
        }
        with ExitStack() as stack:
            for presser in pressers.values():
                stack.enter_context(presser)
                time.sleep(_WARM_UP_S)  # the first mesh is being decoded when the queue fills up
            pressed = process.submit(measure, url, arguments.budget, arguments.seconds).result()
    rows = [row_of("quiet", quiet, quiet_s), row_of("pressed", pressed, quiet_s)]
    show("images of high priority, and /healthz", rows)
    answers = {name: dict(presser.answers) for name, presser in pressers.items()}
    print(f"answers to the others: {answers}")
    faults = [
        f"{name} are answered {status}"
        for name, presser in pressers.items()
        for status in presser.answers
        if status not in _ANSWERS[name]
    ]
    result = {
        "benchmark": "pressure",
        "environment": environment(),
        "seconds": arguments.seconds,
        "budget": arguments.budget,
        "phases": rows,
        "answers": answers,
        "faults": faults,
    }
    finish(result, arguments.json)
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
