"""What does an API node take: how soon does it answer, and how much memory does it hold?

`python -m benchmarks.api_node` starts `elastic-dit serve --no-worker` beside a Redis of its own, `--rounds` times one
after the other, as a user would. Of each it measures the time from the start of the process to the first answer of
/healthz, the processor time until then, and the resident memory then and after 200 calls of /v1/models. The exit status
is 1 if a median is above the limit: 2 s, 150 MB.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2

from benchmarks.environment import environment
from benchmarks.processes import RedisServer
from benchmarks.table import TableRow, finish, show

MAX_START_S, MAX_RESIDENT_MB = 2.0, 150.0
NUM_CALLS = 200
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Start:
    """One start of an API node. Memory is in megabytes."""

    start_s: float
    cpu_s: float
    resident: float
    resident_after_calls: float


def resident_mb(process_id: int) -> float:
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6


def cpu_seconds(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def start_once(redis_url: str) -> Start:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", "--no-worker", "--port", str(port)]
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, "ELASTIC_REDIS_URL": redis_url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not answers(port):
            if process.poll() is not None:
                raise RuntimeError(f"the API node ended with status {process.returncode}")
            time.sleep(0.01)
        start_s, cpu_s, resident = time.perf_counter() - began, cpu_seconds(process.pid), resident_mb(process.pid)
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
            for _ in range(NUM_CALLS):
                client.get("/v1/models").raise_for_status()
        return Start(start_s, cpu_s, resident, resident_mb(process.pid))
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        redis = RedisServer(Path(folder))
        try:
            start_once(redis.url)  # warms the caches of files
            starts = [start_once(redis.url) for _ in range(rounds)]
        finally:
            redis.kill()
    columns = {
        "start s": [start.start_s for start in starts],
        "processor s": [start.cpu_s for start in starts],
        "resident MB": [start.resident for start in starts],
        f"after {NUM_CALLS} calls": [start.resident_after_calls for start in starts],
    }
    rows: list[TableRow] = [
        {"": name, "median": statistics.median(values), "least": min(values), "most": max(values)}
        for name, values in columns.items()
    ]
    show(f"{rounds} starts of elastic-dit serve --no-worker", rows)
    finish({"benchmark": "api_node", **environment(), "rounds": rounds, "results": rows}, arguments.json)
    medians = [statistics.median(values) for values in columns.values()]
    return int(medians[0] > MAX_START_S or max(medians[2:]) > MAX_RESIDENT_MB)


if __name__ == "__main__":
    sys.exit(main())
