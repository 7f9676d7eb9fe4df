"""Is any job lost while Ray scales the workers and processes are killed?

`python -m benchmarks.ray_scaling` starts a Redis, three nodes of Ray, and the application of deploy/ray on them, with
the small FLUX. Clients ask for images over HTTP. The load rises, so that the workers go from one replica to three;
under load, the API, a worker, a node and Serve's controller are killed, one after the other; then the load falls, and
the workers go back to one. A second run goes from zero to three and back to zero. In the end every job that was
accepted must have succeeded, and have ended once.

It prints what happened, and when. The exit status is 1 if a job was lost or ended twice. Ray binds to all addresses of
the machine, so the whole runs in a network namespace that has no other machine: it needs `unshare` and `ip`, and the
right to use them.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.ray_scaling.isolation import INSIDE, isolated

BODY: dict[str, Any] = {"prompt": "a red circle above a blue square", "budget": {"preset": "fast"}, "n": 2}
KILLS = {1: (("worker",), ("node",), ("controller",), ("api",)), 0: (("worker", "controller", "node"),)}
"""By the scale at which a run begins."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ray_scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--depth", type=int, default=24, help="unfinished jobs while the scale is to rise")
    parser.add_argument("--target-s", type=float, default=4.0, help="seconds of backlog for each worker")
    parser.add_argument("--least", type=int, choices=(0, 1), nargs="*", default=(1, 0), help="where the runs begin")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as folder:
        if INSIDE not in os.environ:
            command, environment = isolated(
                [sys.executable, "-m", "benchmarks.ray_scaling", *sys.argv[1:]], Path(folder)
            )
            return subprocess.run(command, env=environment, check=False).returncode
        return _prove(options, Path(folder))


def _prove(options: argparse.Namespace, folder: Path) -> int:
    from benchmarks.environment import environment
    from benchmarks.ray_scaling.cluster import ray_cluster
    from benchmarks.ray_scaling.run import Findings, Plan, scale
    from benchmarks.table import finish, show
    from deploy.ray.app import Arguments, ModelArguments
    from service.loading import load_models

    runs: dict[str, Findings] = {}
    for least in options.least:
        plan = Plan("tiny-flux", BODY, least, 3, options.depth, options.target_s, KILLS[least])
        scaling = {"min_replicas": least, "max_replicas": 3, "upscale_delay_s": 0, "downscale_delay_s": 3}
        of_workers = {"target_backlog_s": options.target_s}
        model = ModelArguments(model=Path("tiny-flux"), settings=of_workers, autoscaling=scaling)
        arguments = Arguments(models=[model], settings={"lease_s": 2, "grace_s": 20, "max_backlog_s": 1000})
        name = f"{least} -> 3 -> {least}"
        print(f"\n{name}", flush=True)
        (own := folder / name).mkdir()
        with ray_cluster(arguments, load_models, own) as cluster:
            runs[name] = asyncio.run(scale(plan, cluster))
    show(
        "jobs",
        [
            {"run": name, "accepted": len(found.accepted), **found.ends, "seconds": found.seconds}
            for name, found in runs.items()
        ],
    )
    show("seconds until it was back", [{"run": name, **found.seconds_back} for name, found in runs.items()])
    faults = [fault for found in runs.values() for fault in found.faults]
    print("\n".join(faults) or "\nno job was lost or ended twice")
    result = {
        "benchmark": "ray_scaling",
        "environment": environment(),
        "depth": options.depth,
        "target_s": options.target_s,
        "runs": {name: found.as_json() for name, found in runs.items()},
    }
    finish(result, options.json)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
