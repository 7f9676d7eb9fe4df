"""Run Ray and the application on this machine: `python -m deploy.ray`, until SIGINT or SIGTERM, which drain it.

With ELASTIC_REDIS_URL the queue is in that Redis, and jobs outlive this command. Without it, the command starts a Redis
of its own in a temporary folder. The API listens on 127.0.0.1; docs/ray.md says what Ray itself listens on.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import NoReturn

# Ray reads these when it is imported. By default it reports its use, and its workers yield to all other processes.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_enable_metrics_collection", "0")
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
from ray import serve

from deploy.ray.app import AFTER_GRACE_S, Arguments, ModelArguments, build
from service.errors import BadConfiguration
from service.settings import load_settings

APPLICATION = "elastic-dit"
ROOT = Path(__file__).parents[2]
_POLL_S = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--models", help="model directories, or names in checkpoints/, separated by commas")
    parser.add_argument("--min-workers", type=int, default=1, help="of each model [default: 1]")
    parser.add_argument("--max-workers", type=int, default=2, help="of each model [default: 2]")
    options = parser.parse_args(arguments)
    with _own_redis():
        settings = load_settings(models=options.models, port=options.port)
        scaling = {"min_replicas": options.min_workers, "max_replicas": options.max_workers}
        models = [ModelArguments(model=model, autoscaling=scaling) for model in settings.models]
        # Ray counts processors and starts nothing beyond them. Here workers share the ones that there are.
        num_cpus = max(os.cpu_count() or 1, 1 + options.max_workers * len(models))
        with _ray(num_cpus), _application(Arguments(models=models), settings.port, settings.grace_s):
            print(f"running on http://127.0.0.1:{settings.port}; Ctrl-C ends it", flush=True)
            while True:
                time.sleep(1)


def _end(number: int, _: FrameType | None) -> NoReturn:
    """Unwinds the stack, which drains and ends everything."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)
    raise SystemExit(0)


@contextmanager
def _own_redis() -> Iterator[None]:
    """A Redis for ELASTIC_REDIS_URL, if that is not set."""
    if os.environ.get("ELASTIC_REDIS_URL"):
        yield
        return
    if shutil.which("redis-server") is None:
        raise BadConfiguration("redis-server not found: install it, or set ELASTIC_REDIS_URL")
    with TemporaryDirectory(prefix="elastic-dit-redis-") as folder:
        socket = f"{folder}/redis.sock"
        command = ["redis-server", "--port", "0", "--unixsocket", socket, "--dir", folder, "--appendonly", "yes"]
        process = subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            os.environ["ELASTIC_REDIS_URL"] = f"unix://{socket}"
            yield
        finally:
            process.terminate()
            process.wait()


@contextmanager
def _ray(num_cpus: int) -> Iterator[None]:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which sets a handler too
        signal.signal(number, _end)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _application(arguments: Arguments, port: int, grace_s: float) -> Iterator[None]:
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build(arguments), name=APPLICATION)
        yield
    finally:
        serve.delete(APPLICATION, _blocking=False)
        ends = time.monotonic() + grace_s + AFTER_GRACE_S
        while APPLICATION in serve.status().applications and time.monotonic() < ends:
            time.sleep(_POLL_S)
        serve.shutdown()


if __name__ == "__main__":
    sys.exit(main())
