"""One worker process for each device of a machine: starts them, starts dead ones again, and drains them together."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from service.errors import BadConfiguration, Broken
from service.settings import Settings

logger = logging.getLogger(__name__)

_LOOK_S = 0.2
"""How often the processes are looked at."""
EARLY_S = 60.0
"""A process that ends sooner has ended at once: loading and the first jobs take about that long."""
_MAX_EARLY = 5
"""How often in a row a process may end at once."""
_FIRST_DELAY_S = 1.0
_LAST_DELAY_S = 30.0
_REFUSED = 2
"""The exit status of `elastic-dit` for settings that can't work: they would not work the next time either."""
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class _Worker:
    device: str
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    starts_at: float = 0.0
    num_early: int = 0  # ends at once, in a row


@dataclass(slots=True)
class Supervisor:
    """Keeps a process running for each command, by the name of its device, until `stop` is called.

    The processes write to this one's outputs.
    """

    commands: dict[str, Sequence[str]]
    first_delay_s: float = _FIRST_DELAY_S
    clock: Callable[[], float] = time.monotonic
    _workers: list[_Worker] = field(default_factory=list)
    _is_stopping: bool = False

    def run(self) -> None:
        """Return once all processes have ended after `stop`. Raises Broken if one ends at once again and again."""
        self._workers = [_Worker(device, command) for device, command in self.commands.items()]
        try:
            while not self._is_stopping:
                for worker in self._workers:
                    self._look_at(worker)
                time.sleep(_LOOK_S)
        finally:
            self._end_all()
        ended = [worker for worker in self._workers if worker.process is not None]
        # One that is loading its models when it is told to drain ends by the signal.
        failed = [worker for worker in ended if _code(worker) not in (0, -signal.SIGTERM)]
        if failed:
            raise Broken(f"the worker on {failed[0].device} ended with status {_status(failed[0])} as it drained")

    def stop(self) -> None:
        """Let all processes drain. A signal handler may call this."""
        self._is_stopping = True

    def _look_at(self, worker: _Worker) -> None:
        """Start the process of a worker if it has ended, after a while. Raises Broken."""
        now = self.clock()
        if worker.process is None:
            if now >= worker.starts_at:
                self._start(worker)
        elif worker.process.poll() is not None:
            if _code(worker) == _REFUSED:
                raise Broken(f"the worker on {worker.device} was refused; the log says why. All workers end")
            worker.num_early = worker.num_early + 1 if now - worker.started < EARLY_S else 1
            if worker.num_early > _MAX_EARLY:
                raise Broken(
                    f"the worker on {worker.device} ended {worker.num_early} times in a row within {EARLY_S:g} s of "
                    f"its start, at last with status {_status(worker)}; the log says why. All workers end"
                )
            delay_s = min(self.first_delay_s * 2 ** (worker.num_early - 1), _LAST_DELAY_S)
            logger.error(
                "the worker on %s ended with status %s; it starts again in %g s",
                worker.device,
                _status(worker),
                delay_s,
            )
            worker.process, worker.starts_at = None, now + delay_s

    def _start(self, worker: _Worker) -> None:
        # In a group of its own: Ctrl-C at a terminal reaches this process alone, which passes it on once.
        worker.process = subprocess.Popen(worker.command, process_group=0, preexec_fn=_drain_when_alone)
        worker.started = self.clock()
        logger.info("the worker on %s is process %d", worker.device, worker.process.pid)

    def _end_all(self) -> None:
        """Let all processes drain, and wait for that: each ends within its grace period."""
        running = [worker.process for worker in self._workers if worker.process is not None]
        for process in running:
            process.send_signal(signal.SIGTERM)  # nothing happens if it has ended
        for process in running:
            process.wait()


def _code(worker: _Worker) -> int:
    assert worker.process is not None
    return worker.process.returncode


def _status(worker: _Worker) -> str:
    """The exit status of a process that has ended, or the signal that ended it."""
    code = _code(worker)
    return str(code) if code >= 0 else signal.Signals(-code).name


def _drain_when_alone() -> None:
    """In the new process: it gets SIGTERM when its parent dies, and keeps no device that nobody watches. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def worker_commands(
    settings: Settings, devices: str, *, models: str | None, config: Path | None
) -> dict[str, Sequence[str]]:
    """The command for each of `devices`, such as cuda:0,cuda:1, by its name. Raises BadConfiguration.

    The first listens at `settings.port`, each other one at the next port; with port 0 each takes a free one.
    """
    names = [name.strip() for name in devices.split(",")]
    if "" in names:
        raise BadConfiguration(f"--devices '{devices}' has an empty name; write cuda:0,cuda:1")
    given = [*(["--models", models] if models else []), *(["--config", str(config)] if config else [])]
    commands: dict[str, Sequence[str]] = {}
    for index, device in enumerate(names):
        port = settings.port + index if settings.port else 0
        name = device if device not in commands else f"{device} ({index})"
        options = ["--device", device, "--host", settings.host, "--port", str(port), *given]
        commands[name] = [sys.executable, "-m", "service.cli", "worker", *options]
    return commands


def run_workers(commands: dict[str, Sequence[str]]) -> None:
    """Keep a worker running for each command until SIGTERM or SIGINT. Raises Broken."""
    supervisor = Supervisor(commands)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    logger.info("process %d runs a worker on each of %s", os.getpid(), ", ".join(commands))
    supervisor.run()
