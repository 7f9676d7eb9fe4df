"""How many workers does one Redis feed, and does anything slow down as the queue grows?

`python -m benchmarks.store` starts a Redis as docker-compose does (append-only file, synced always), queues jobs, and
lets workers claim them: real stores with connections of their own, which compute nothing. Each job is submitted,
claimed, has 5 events of progress, and ends. No client follows it, and its result is not stored.

- Saturated: each ended job is replaced by a new one, so the queue keeps its length, and workers do nothing else. Redis'
  own CPU time for each job depends less on the other processes of the machine than jobs a second do. In the last row,
  Redis begins to rewrite its append-only file (`rewrites`); before the other rows, it has ended that.
- Paced: 50 workers whose jobs take 1 s, and as many jobs, at random times, as keep a part of them busy. An attempt is
  one call of the script that picks and claims a job, whether it finds one or not.
- Alone: one worker, and nobody else calls Redis. These are the claim's own times, and those of the read that admission
  makes, as the client sees them: with the network, and with the sync of what is written.
- Scripts: how long Redis works on each script, by its slow log, with 8 workers.

Redis and this process have priority over the processes of the workers, where the system allows that.

`gpus` is how many workers with jobs of 1 s take all of one core of Redis: 1000 over its CPU milliseconds for each job.
"""

import argparse
import asyncio
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from hashlib import sha1
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks.processes import RedisServer
from benchmarks.store_load import Tally, anything, fill, make_job, make_store, submit, summed, work
from benchmarks.table import TableRow, finish, show
from service.jobs import redis_scripts
from service.jobs.job import JobStatus
from service.jobs.redis_claims import CLAIM
from service.jobs.redis_operations import PREFIX
from service.jobs.store import Ending

_SCRIPTS = {"add": redis_scripts.ADD, "claim": CLAIM, "record": redis_scripts.RECORD, "end": redis_scripts.END}
_WARM_UP_S = 4.0
_NUM_ALONE = 300


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queued", type=int, nargs="+", default=[10, 1000, 100_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 50, 200])
    parser.add_argument("--paces", type=float, nargs="*", default=[0.5, 0.9], help="parts of 50 workers that are busy")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--processes", type=int, default=4, help="that the workers are spread over")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def main() -> None:
    from benchmarks.environment import environment  # imports torch, which the processes of the workers need not

    arguments = parse_arguments()
    saturated: list[TableRow] = []
    paced: list[TableRow] = []
    alone: list[TableRow] = []
    scripts: list[TableRow] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes + 1, context, initializer=set_priority, initargs=(0,)) as pool:
        for num_queued in arguments.queued:
            with tempfile.TemporaryDirectory() as folder:
                server = RedisServer(Path(folder))
                is_favoured = set_priority(-15, os.getpid(), server.process.pid)
                try:
                    bench = Bench(server.url, pool, arguments.processes, arguments.seconds)
                    kilobytes = bench.fill(num_queued)
                    alone.append({"queued": num_queued, "kB_a_job": kilobytes, **asyncio.run(bench.alone())})
                    show("alone", alone)
                    scripts += [{"queued": num_queued, **row} for row in bench.scripts()]
                    show("scripts", scripts)
                    for num_workers in arguments.workers:
                        saturated.append({"queued": num_queued, **bench.saturated(num_workers)})
                        show("saturated", saturated)
                    if num_queued == arguments.queued[-1]:
                        saturated.append({"queued": num_queued, **bench.saturated(50, rewrites=True)})
                        show("saturated", saturated)
                    if num_queued == arguments.queued[0]:
                        bench.empty()
                        for pace in arguments.paces:
                            paced.append(bench.paced(50, pace))
                            show("paced", paced)
                finally:
                    server.kill()
    result = {
        "benchmark": "store",
        "environment": environment(),
        "seconds": arguments.seconds,
        "processes": arguments.processes,
        "redis_is_favoured": is_favoured,
        "saturated": saturated,
        "paced": paced,
        "alone": alone,
        "scripts": scripts,
    }
    finish(result, arguments.json)


def set_priority(nice: int, *processes: int) -> bool:
    """Of this process if no others are given. Returns whether it is allowed."""
    try:
        for process in processes or (os.getpid(),):
            os.setpriority(os.PRIO_PROCESS, process, nice)
    except PermissionError:
        return False
    return True


class Bench:
    """One Redis, and the processes of its clients."""

    def __init__(self, url: str, pool: ProcessPoolExecutor, num_processes: int, seconds: float) -> None:
        self._url = url
        self._pool = pool
        self._num_processes = num_processes
        self._seconds = seconds
        self._redis: Any = redis.Redis.from_url(url)

    def fill(self, num_jobs: int) -> float:
        """Queue so many jobs. Returns kilobytes of Redis' memory for each."""
        before = self._redis.info("memory")["used_memory"]
        parts = [num_jobs // self._num_processes] * self._num_processes
        parts[0] += num_jobs - sum(parts)
        filling = [
            self._pool.submit(fill, self._url, part, f"fill{number}") for number, part in enumerate(parts) if part
        ]
        for future in filling:
            future.result()
        return float((self._redis.info("memory")["used_memory"] - before) / num_jobs / 1000)

    def empty(self) -> None:
        self._redis.flushall()

    def saturated(self, num_workers: int, *, rewrites: bool = False) -> TableRow:
        while self._redis.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.1)
        until = time.time() + _WARM_UP_S + self._seconds
        working = self._start_workers(num_workers, 0.0, until)
        time.sleep(_WARM_UP_S)
        if rewrites and not self._redis.info("persistence")["aof_rewrite_in_progress"]:
            self._redis.bgrewriteaof()
        return {"workers": num_workers, "rewrites": rewrites, **self._measure(working, until)}

    def paced(self, num_workers: int, pace: float) -> TableRow:
        until = time.time() + _WARM_UP_S + 2 * self._seconds
        working = self._start_workers(num_workers, 1.0, until)
        time.sleep(_WARM_UP_S / 2)
        submitting = self._pool.submit(submit, self._url, pace * num_workers, until, f"paced{pace}")
        time.sleep(_WARM_UP_S / 2)
        row: TableRow = {"workers": num_workers, "pace": pace, **self._measure(working, until)}
        submitting.result()
        self.empty()
        return row

    async def alone(self) -> TableRow:
        store = make_store(self._url)
        claims, loads, positions = [], [], []
        for _ in range(_NUM_ALONE):
            job = await store.add(make_job("alone"))
            began = time.perf_counter()
            claim = await store.claim(anything)
            claims.append(time.perf_counter() - began)
            assert claim is not None
            await store.end(Ending(claim, JobStatus.SUCCEEDED, artifacts=(b"image",)))
            began = time.perf_counter()
            await store.load("key0")
            loads.append(time.perf_counter() - began)
            began = time.perf_counter()
            await store.positions([job.id])
            positions.append(time.perf_counter() - began)
        await store.close()
        return {
            **{f"claim_ms_p{q}": _percentile(claims, q) for q in (50, 99)},
            **{f"load_ms_p{q}": _percentile(loads, q) for q in (50, 99)},
            **{f"position_ms_p{q}": _percentile(positions, q) for q in (50, 99)},
        }

    def scripts(self) -> list[TableRow]:
        """Milliseconds of Redis' work on each script."""
        self._redis.config_set("slowlog-max-len", 20_000)
        until = time.time() + _WARM_UP_S + 2.0
        working = self._start_workers(8, 0.0, until)
        time.sleep(_WARM_UP_S)
        self._redis.slowlog_reset()
        self._redis.config_set("slowlog-log-slower-than", 0)
        for future in working:
            future.result()
        self._redis.config_set("slowlog-log-slower-than", -1)
        entries = self._redis.slowlog_get(20_000)
        rows: list[TableRow] = []
        for name, script in _SCRIPTS.items():
            sha = sha1(script.encode()).hexdigest().encode()
            times = [entry["duration"] / 1e6 for entry in entries if sha in entry["command"]]
            rows.append({"script": name, "calls": len(times), **{f"ms_p{q}": _percentile(times, q) for q in (50, 99)}})
        return rows

    def _start_workers(self, num_workers: int, service_s: float, until: float) -> "list[Future[Tally]]":
        num_processes = min(num_workers, self._num_processes)
        parts = [num_workers // num_processes + (n < num_workers % num_processes) for n in range(num_processes)]
        return [
            self._pool.submit(work, self._url, part, service_s, time.time() + _WARM_UP_S, until, f"w{number}")
            for number, part in enumerate(parts)
        ]

    def _measure(self, working: "list[Future[Tally]]", until: float) -> TableRow:
        began, cpu_s, ended = time.time(), self._cpu_s(), self._num_ended()
        time.sleep(max(0.0, until - 0.2 - time.time()))
        seconds, cpu_s, num_jobs = time.time() - began, self._cpu_s() - cpu_s, self._num_ended() - ended
        tally = summed([future.result() for future in working])
        cpu_ms = cpu_s * 1000 / max(1, num_jobs)
        return {
            "jobs_a_s": num_jobs / seconds,
            "redis_cpu_ms": cpu_ms,
            "gpus": round(1000 / cpu_ms),
            "attempts_a_job": tally.num_attempts / max(1, tally.num_jobs),
            **{f"claim_ms_p{q}": _percentile(tally.claim_s, q) for q in (50, 99)},
            "wait_ms_p50": _percentile(tally.wait_s, 50),
        }

    def _cpu_s(self) -> float:
        cpu = self._redis.info("cpu")
        return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])

    def _num_ended(self) -> int:
        return int(self._redis.zcard(f"{PREFIX}expiring"))


def _percentile(seconds: list[float], percent: int) -> float:
    """In milliseconds."""
    return float(np.percentile(seconds, percent)) * 1000 if seconds else float("nan")


if __name__ == "__main__":
    main()
