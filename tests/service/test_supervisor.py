"""The supervisor with small programs in place of workers."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest

from service import supervisor
from service.errors import BadConfiguration, Broken
from service.settings import Settings
from service.supervisor import Supervisor, worker_commands
from tests.fixtures.waiting import wait_until

# Writes a line when it starts and when it is told to drain, which takes it a moment.
WORKER = """
import os, pathlib, signal, sys, time
log = pathlib.Path(sys.argv[1])
def say(word):
    with log.open("a") as file:
        file.write(f"{word} {os.getpid()}\\n")
def drain(*_):
    time.sleep(0.2)
    say("drained")
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
say("started")
while True:
    time.sleep(60)
"""


def worker(log: Path) -> list[str]:
    return [sys.executable, "-S", "-c", WORKER, str(log)]


def started(log: Path) -> list[int]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("started")]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_LOOK_S", 0.01)


class Run:
    """A supervisor that runs in a thread, with the error that it ended with."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.error: Broken | None = None
        self._thread = Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.supervisor.run()
        except Broken as error:
            self.error = error

    def stop(self) -> None:
        self.supervisor.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def run() -> Iterator[Callable[[Supervisor], Run]]:
    """Run a supervisor; it is stopped after the test."""
    with ExitStack() as stack:

        def begin(supervisor: Supervisor) -> Run:
            running = Run(supervisor)
            stack.callback(running.stop)
            return running

        yield begin


def test_dead_worker_starts_again_and_all_drain_together(
    tmp_path: Path, run: Callable[[Supervisor], Run], caplog: pytest.LogCaptureFixture
) -> None:
    logs = [tmp_path / "a", tmp_path / "b"]
    both = Supervisor({"cuda:0": worker(logs[0]), "cuda:1": worker(logs[1])}, first_delay_s=0.01)
    running = run(both)
    wait_until(lambda: all(started(log) for log in logs))
    os.kill(started(logs[0])[0], signal.SIGKILL)
    wait_until(lambda: len(started(logs[0])) == 2)
    assert "the worker on cuda:0 ended with status SIGKILL; it starts again in 0.01 s" in caplog.text
    running.stop()
    first, second = (log.read_text() for log in logs)
    assert first.endswith(f"drained {started(logs[0])[1]}\n")
    assert second == f"started {started(logs[1])[0]}\ndrained {started(logs[1])[0]}\n"


def test_worker_that_ends_at_once_again_and_again_ends_all(tmp_path: Path) -> None:
    log = tmp_path / "good"
    failing = [sys.executable, "-S", "-c", "raise SystemExit(3)"]
    both = Supervisor({"cuda:0": worker(log), "cuda:9": failing}, first_delay_s=0.001)
    with pytest.raises(Broken, match=r"the worker on cuda:9 ended 6 times in a row within 60 s .* with status 3"):
        both.run()
    assert not started(log) or "drained" in log.read_text()


def test_failures_that_are_far_apart_do_not_add_up(tmp_path: Path, run: Callable[[Supervisor], Run]) -> None:
    begun = time.monotonic()

    def clock() -> float:  # in which each process runs for minutes
        return begun + (time.monotonic() - begun) * 10_000

    log = tmp_path / "log"
    command = [sys.executable, "-S", "-c", f"open({str(log)!r}, 'a').write('started 1\\n'); raise SystemExit(1)"]
    run(Supervisor({"cpu": command}, clock=clock))
    wait_until(lambda: len(started(log)) > 7)


def test_settings_that_are_refused_are_not_tried_again() -> None:
    refused = Supervisor({"cuda:0": [sys.executable, "-S", "-c", "raise SystemExit(2)"]})
    with pytest.raises(Broken, match="the worker on cuda:0 was refused; the log says why"):
        refused.run()


def test_worker_that_fails_to_drain_is_told(tmp_path: Path, run: Callable[[Supervisor], Run]) -> None:
    log = tmp_path / "log"
    program = WORKER.replace("sys.exit(0)", "sys.exit(1)")
    running = run(Supervisor({"cpu": [sys.executable, "-S", "-c", program, str(log)]}))
    wait_until(lambda: bool(started(log)))
    running.stop()
    assert str(running.error) == "the worker on cpu ended with status 1 as it drained"


def test_each_device_has_a_port_of_its_own() -> None:
    settings = Settings(host="0.0.0.0", port=9000)
    commands = worker_commands(settings, "cuda:0, cuda:1,cpu,cpu", models="a,b", config=Path("c.toml"))
    assert [*commands] == ["cuda:0", "cuda:1", "cpu", "cpu (3)"]
    assert [*commands["cuda:1"]] == [
        *(sys.executable, "-m", "service.cli", "worker", "--device", "cuda:1", "--host", "0.0.0.0", "--port", "9001"),
        *("--models", "a,b", "--config", "c.toml"),
    ]
    free = worker_commands(Settings(port=0), "cpu,cpu", models=None, config=None)
    assert [command[-2:] for command in free.values()] == [["--port", "0"]] * 2
    with pytest.raises(BadConfiguration, match="'cuda:0,' has an empty name; write cuda:0,cuda:1"):
        worker_commands(settings, "cuda:0,", models=None, config=None)
