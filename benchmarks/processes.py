"""Processes that benchmarks and tests start on this machine and may kill: Redis, servers, workers."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from threading import Thread

_READY = re.compile(r"running on (http://[^ ]+)")
_START_S, _STOP_S = 180, 60


class RedisServer:
    """A Redis of one's own on a free port, with its append-only file in `folder`: what it promised survives a kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *("redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
                *("--appendonly", "yes", "--appendfsync", "always", "--save", "", "--maxmemory-policy", "noeviction"),
            ],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"redis-server does not answer (exit status {self.process.poll()})")
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


class ElasticDit:
    """`elastic-dit serve` or `worker` on a free port; `url` is "" until it answers. Its log goes to the file `log`."""

    def __init__(self, command: str, log: Path, *options: str, **environment: str) -> None:
        self._command: Sequence[str] = (sys.executable, "-m", "service.cli", command, "--port", "0", *options)
        self._environment = environment
        self._log = log
        self.start()

    def start(self) -> None:
        self.url = ""
        self.process = subprocess.Popen(
            self._command, env={**os.environ, **self._environment}, stderr=subprocess.PIPE, text=True
        )
        self._addresses: Queue[str] = Queue()
        Thread(target=self._read_log, args=(self.process, self._addresses), daemon=True).start()

    def wait_until_ready(self) -> str:
        """Its address. Raises RuntimeError if it ends instead."""
        self.url = self._addresses.get(timeout=_START_S)
        if not self.url:
            raise RuntimeError(f"elastic-dit ended with {self.process.wait(_STOP_S)}:\n{self._log.read_text()[-2000:]}")
        return self.url

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(_STOP_S)

    def stop(self) -> int:
        """Ask it to drain, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_STOP_S)

    def _read_log(self, process: "subprocess.Popen[str]", addresses: "Queue[str]") -> None:
        assert process.stderr is not None
        with process.stderr as lines, self._log.open("a") as log:
            for line in lines:
                log.write(line)
                log.flush()
                if match := _READY.search(line):
                    addresses.put(match[1])
        addresses.put("")
