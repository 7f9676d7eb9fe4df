"""The server as people run it: a process of its own, on a free port, with the models that ship with the repository."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from threading import Thread

import pytest

ROOT = Path(__file__).parents[2]
READY = re.compile(r"running on (http://[^ ]+)")
START_S, STOP_S = 180, 60


def start_server(**environment: str) -> tuple[subprocess.Popen[str], str]:
    """The process and its address, once it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "serve", "--port", "0"],
        cwd=ROOT,
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    urls: Queue[str] = Queue()
    Thread(target=_read_log, args=(process, urls), daemon=True).start()
    url = urls.get(timeout=START_S)
    if not url:
        pytest.fail(f"the server ended with exit code {process.wait(STOP_S)}")
    return process, url


def _read_log(process: subprocess.Popen[str], urls: "Queue[str]") -> None:
    """Show the server's log in the test's output, and put the address in it into `urls`; "" if it ends without one."""
    assert process.stderr is not None
    with process.stderr as log:
        for line in log:
            print(line, end="")
            if match := READY.search(line):
                urls.put(match[1])
    urls.put("")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a server that all tests share."""
    process, url = start_server()
    yield url
    process.terminate()
    process.wait(STOP_S)


@pytest.fixture
def own_server() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Start a server of the test's own, with environment variables; it is killed if the test leaves it running."""
    processes = []

    def start(**environment: str) -> tuple[subprocess.Popen[str], str]:
        process, url = start_server(**environment)
        processes.append(process)
        return process, url

    yield start
    for process in processes:
        process.kill()
        process.wait(STOP_S)
