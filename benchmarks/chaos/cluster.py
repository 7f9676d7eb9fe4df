"""Redis, servers and workers that share it, and the volume of results. Faults may befall any of them."""

import math
import os
import queue
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import redis

from benchmarks.chaos.tasks import IMAGE_MODEL, MESH_MODEL
from benchmarks.chaos.webhooks import SECRET
from benchmarks.processes import RedisServer
from examples.server_process import ElasticDit, ServerEnded

MAX_ATTEMPTS = 10
GRACE_S = 5.0
LEASE_S = 3.0
_CALL_S = 20.0
_MARK = "CHAOS_RUN"  # in the environment of all processes of a run
_STOP_S = GRACE_S + 55  # its last step, sending what is left, and a slow machine
_VOLUME_BYTES = 32_000_000


class Stuck(Exception):
    """No server gave an answer in time."""


class Member:
    """A server or worker, started again after each end. The fault that ends it sets `is_expected_to_end`."""

    def __init__(self, kind: str, number: int, log: Path, environment: dict[str, str]) -> None:
        self.kind = kind
        self.name = f"{kind} {number}"
        self.is_expected_to_end = False
        self.process = ElasticDit(kind, log, **environment)
        self._wait_in_background()

    @property
    def is_ready(self) -> bool:
        return self.process.url != "" and self.process.process.poll() is None

    def start(self) -> None:
        self.process.start()
        self.is_expected_to_end = False
        self._wait_in_background()

    def _wait_in_background(self) -> None:
        def wait() -> None:
            # An end is noticed by its exit status, and `wait_until_ready` of the cluster notices the rest.
            with suppress(ServerEnded, queue.Empty, subprocess.TimeoutExpired):
                self.process.wait_until_ready()

        Thread(target=wait, daemon=True).start()

    def signal(self, number: int) -> None:
        self.process.process.send_signal(number)


@dataclass
class Exits:
    """How members ended. `counts` is by kind, cause and status; `faults` has what no injected fault explains."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def notice(self, members: Sequence[Member]) -> None:
        """Start members again that no fault has ended."""
        for member in members:
            status = member.process.process.poll()
            if status is not None and not member.is_expected_to_end:
                self.counts[f"{member.kind}: by itself, {status}"] += 1
                log = member.process.end_of_log()
                self.faults.append(f"{member.name} ended by itself with status {status}:\n{log}")
                member.start()

    def note_kill(self, member: Member) -> None:
        self.counts[f"{member.kind}: SIGKILL, {member.process.process.returncode}"] += 1

    def note_stop(self, member: Member) -> None:
        """Wait for the end of a member that was sent SIGTERM. It must end in time, and well."""
        try:
            status: int | str = member.process.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            member.process.kill()
            status = f"none in {_STOP_S:g} s"
        self.counts[f"{member.kind}: SIGTERM, {status}"] += 1
        if status != 0:
            log = member.process.end_of_log()
            self.faults.append(f"{member.name} was sent SIGTERM and ended with status {status}:\n{log}")


class Cluster:
    """`faults` describes what its processes did wrong, apart from their `exits`.

    `emptied_at` has the times at which Redis was emptied, by `time.monotonic`; infinity while it happens.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_servers: int,
        num_workers: int,
        webhook_hosts: str,
        other: Path | None = None,
    ) -> None:
        self.exits = Exits()
        self.faults: list[str] = []
        self.emptied_at: list[float] = []
        self.http = httpx2.Client(timeout=_CALL_S)
        self.volume = _mount(folder / "results")
        self.redis = RedisServer(folder)
        environment = {
            "ELASTIC_REDIS_URL": self.redis.url,
            "ELASTIC_RESULTS_URL": (folder / "results").as_uri(),
            "ELASTIC_MODELS": f"{IMAGE_MODEL},{MESH_MODEL}",
            "ELASTIC_LEASE_S": str(LEASE_S),
            "ELASTIC_GRACE_S": str(GRACE_S),
            "ELASTIC_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "ELASTIC_MAX_BACKLOG_S": "100000",
            "ELASTIC_MAX_RESULT_BYTES": str(_VOLUME_BYTES // 2),
            "ELASTIC_WEBHOOK_HOSTS": webhook_hosts,
            "ELASTIC_WEBHOOK_SECRET": SECRET,
            "OMP_NUM_THREADS": "1",
            _MARK: self.redis.url,
        }
        # Python then finds the packages of the other checkout first, and none in the working directory.
        of_other = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(other)} if other else {}
        self.members: list[Member] = []
        for kind, count in (("serve", num_servers), ("worker", num_workers)):
            for number in range(count):
                settings = {**environment, **(of_other if number % 2 else {})}
                self.members.append(Member(kind, number, folder / f"{kind}{number}.log", settings))

    @property
    def logs(self) -> list[Path]:
        return sorted(Path(self.redis.folder).glob("*.log"))

    def client(self) -> Any:
        return redis.Redis.from_url(self.redis.url, socket_timeout=60)

    def wait_until_ready(self, limit_s: float) -> None:
        """Wait for all members. Those that are not ready in time are faults."""
        deadline = time.monotonic() + limit_s
        while not all(member.is_ready for member in self.members) and time.monotonic() < deadline:
            self.exits.notice(self.members)
            time.sleep(0.2)
        self.faults += [f"{m.name} is not ready after {limit_s:g} s" for m in self.members if not m.is_ready]

    def servers(self) -> list[Member]:
        """The servers that may answer, in random order."""
        ready = [member for member in self.members if member.kind == "serve" and member.is_ready]
        return random.sample(ready, len(ready))

    def call(self, method: str, path: str, *, until: float, **options: Any) -> httpx2.Response:
        """The first answer of any server other than 503. Raises Stuck if there is none until the time `until`."""
        while time.monotonic() < until:
            for server in self.servers():
                try:
                    response = self.http.request(method, server.process.url + path, **options)
                except (httpx2.TransportError, httpx2.DecodingError):
                    continue
                if response.status_code != 503:
                    return response
            time.sleep(0.1)
        raise Stuck(f"{method} {path} got no answer")

    def is_emptied_since(self, began: float) -> bool:
        return any(at >= began for at in self.emptied_at)

    def empty_redis(self) -> None:
        self.emptied_at.append(math.inf)
        self.client().flushall()
        self.emptied_at[-1] = time.monotonic()

    def stop_all(self) -> None:
        """Stop all members at once; each must exit with status 0."""
        for member in self.members:
            member.is_expected_to_end = True
            member.signal(signal.SIGTERM)
        for member in self.members:
            self.exits.note_stop(member)

    def note_left_processes(self) -> None:
        """Count processes that outlive all members, such as those that decode, as faults."""
        mark = f"{_MARK}={self.redis.url}".encode()
        deadline = time.monotonic() + _STOP_S
        while (left := _processes_with(mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.faults += [f"a process outlives its server: {command}" for command in left]

    def close(self) -> None:
        self.http.close()
        for member in self.members:
            member.process.kill()
        self.redis.kill()
        if self.volume is not None:
            subprocess.run(["umount", "--lazy", self.volume], check=True)


def _processes_with(mark: bytes) -> list[str]:
    """The command lines of the processes whose environment has the entry `mark`."""
    commands = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if mark in (process / "environ").read_bytes().split(b"\0"):
                commands.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return commands


def _mount(folder: Path) -> Path | None:
    """A small file system at `folder`, which can be filled; None if that takes more rights than this process has."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_VOLUME_BYTES}", "chaos", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    return folder if is_mounted else None
