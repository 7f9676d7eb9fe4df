"""A server or worker in a process of its own on this machine, for the demo, the benchmarks and the tests."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Self

_READY = re.compile(r"running on (http://[^ ]+)")
_START_S, _STOP_S = 240, 60
_NUM_LOG_LINES = 20


class ServerEnded(RuntimeError):
    """The process ended before it was ready. The message has its exit status and the end of its log."""


class ElasticDit:
    """`elastic-dit serve` or `worker` on a free port. `url` is "" until it is ready. It logs to the file `log`.

    As a context manager it stops at the end of the block.
    """

    def __init__(self, command: str, log: Path, *options: str, **environment: str) -> None:
        self._command: Sequence[str] = (sys.executable, "-m", "service.cli", command, "--port", "0", *options)
        self._environment = environment
        self._log = log
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is not None:
            return
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.kill()

    def start(self) -> None:
        self.url = ""
        self.process = subprocess.Popen(
            self._command, env={**os.environ, **self._environment}, stderr=subprocess.PIPE, text=True
        )
        self._addresses: Queue[str] = Queue()
        Thread(target=self._read_log, args=(self.process, self._addresses), daemon=True).start()

    def wait_until_ready(self) -> str:
        """Its address, once its models are loaded. Raises ServerEnded if it ends instead."""
        self.url = self._addresses.get(timeout=_START_S)
        if not self.url:
            status = self.process.wait(_STOP_S)
            raise ServerEnded(f"The server ended with status {status}:\n{self.end_of_log()}")
        return self.url

    def end_of_log(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_NUM_LOG_LINES:])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(_STOP_S)

    def stop(self) -> int:
        """Let it finish its jobs, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_STOP_S)

    def _read_log(self, process: "subprocess.Popen[str]", addresses: "Queue[str]") -> None:
        """Copy the log to its file. Put the address into `addresses` when a line names it, and "" at the end."""
        assert process.stderr is not None
        with process.stderr as lines, self._log.open("a") as log:
            for line in lines:
                log.write(line)
                log.flush()
                if match := _READY.search(line):
                    addresses.put(match[1])
        addresses.put("")
