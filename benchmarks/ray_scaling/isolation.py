"""A namespace for Ray, which listens on all addresses of the machine and leaves processes behind when it is killed."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

INSIDE = "ELASTIC_DIT_ISOLATED"
_ROOT = Path(__file__).parents[2]
# All processes inside end with the first one.
_UNSHARE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
_AS_USER = () if os.geteuid() == 0 else ("--map-root-user",)
# Ray reports its use to its makers unless it is told not to, and lets its workers yield to all other processes.
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_worker_niceness": "0",
}


def why_not() -> str | None:
    """Why there can be no namespace here; None if there can be one."""
    try:
        subprocess.run(
            [*_UNSHARE, *_AS_USER, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=True
        )
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    except subprocess.CalledProcessError as error:
        return f"no namespace: {error.stderr.strip()}"
    return None


def isolated(command: Sequence[str], folder: Path) -> tuple[list[str], Mapping[str, str]]:
    """The command that runs `command` where only the loopback device is, and its environment.

    Ray keeps its sockets in `folder`, whose path must be short.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **_RAY, "RAY_TMPDIR": str(folder), "PYTHONPATH": path, INSIDE: "1"}
    return [*_UNSHARE, *_AS_USER, "bash", "-c", 'ip link set lo up && "$@"', "-", *command], environment
