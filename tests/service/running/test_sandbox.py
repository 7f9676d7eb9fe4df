"""Sandboxes with real processes, and functions of the standard library in them."""

import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest

from models.errors import EmptySurface
from models.file_formats import MeshFormat
from models.mesh.file import make_mesh_file
from models.mesh.surface import FieldSamples
from service.api.input_image import checked_image
from service.errors import InvalidImage, SandboxFailed
from service.running.sandbox import NotWanted, Sandbox

GIGABYTE = 10**9
TIMEOUT_S = 20

# Starts a sandbox whose process then computes for a minute, and says which process that is.
_SERVER = """
import os, time, sys
from threading import Thread
from service.running.sandbox import Sandbox
sandbox = Sandbox()
print(sandbox.run(os.getpid, max_bytes=10**9), flush=True)
Thread(target=sandbox.run, args=(time.sleep, 60), kwargs={"max_bytes": 10**9}, daemon=True).start()
sys.stdin.read()
"""


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


def is_running(pid: int) -> bool:
    """Whether there is such a process that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_ended(pid: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.01)


def test_calls_run_in_one_process_that_is_not_ours(sandbox: Sandbox) -> None:
    pids = {sandbox.run(os.getpid, max_bytes=GIGABYTE) for _ in range(2)}
    assert len(pids) == 1
    assert os.getpid() not in pids


def test_error_of_a_function_is_raised_with_the_place_where_it_happened(sandbox: Sandbox) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        sandbox.run(operator.truediv, 1, 0, max_bytes=GIGABYTE)
    assert "sandbox_process.py" in caught.value.__notes__[0]
    assert sandbox.run(operator.add, 1, 2, max_bytes=GIGABYTE) == 3


def test_call_that_needs_too_much_memory_fails_alone(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxFailed, match=r"needs more than the 0\.5 GB of memory"):
        sandbox.run(bytearray, GIGABYTE, max_bytes=GIGABYTE // 2)
    assert sandbox.run(len, bytes(1000), max_bytes=GIGABYTE // 2) == 1000


def test_process_that_ends_fails_its_call_alone(sandbox: Sandbox) -> None:
    first = sandbox.run(os.getpid, max_bytes=GIGABYTE)
    with pytest.raises(SandboxFailed, match="ended by signal SIGKILL"):
        sandbox.run(os.kill, first, signal.SIGKILL, max_bytes=GIGABYTE)
    with pytest.raises(SandboxFailed, match="ended with code 3"):
        sandbox.run(os._exit, 3, max_bytes=GIGABYTE)
    assert sandbox.run(os.getpid, max_bytes=GIGABYTE) != first


def test_process_killed_between_calls_fails_none(sandbox: Sandbox) -> None:
    pid = sandbox.run(os.getpid, max_bytes=GIGABYTE)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # all its threads have ended; the sandbox still has to reap it
    assert sandbox.run(os.getpid, max_bytes=GIGABYTE) != pid


def test_settings_with_secrets_are_not_passed_on(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_WEBHOOK_SECRET", "whsec_secret")
    assert sandbox.run(os.getenv, "ELASTIC_WEBHOOK_SECRET", max_bytes=GIGABYTE) is None


def test_call_that_is_no_longer_wanted_ends_its_process(sandbox: Sandbox) -> None:
    pid = sandbox.run(os.getpid, max_bytes=GIGABYTE)
    with pytest.raises(NotWanted):
        sandbox.run(time.sleep, 60, max_bytes=GIGABYTE, is_wanted=lambda: False)
    wait_until_ended(pid)


def test_closing_ends_a_running_call(sandbox: Sandbox) -> None:
    pid = sandbox.run(os.getpid, max_bytes=GIGABYTE)
    has_begun, caught = Event(), []

    def is_wanted() -> bool:
        has_begun.set()
        return True

    def call() -> None:
        try:
            sandbox.run(time.sleep, 60, max_bytes=GIGABYTE, is_wanted=is_wanted)
        except NotWanted as error:
            caught.append(error)

    thread = Thread(target=call)
    thread.start()
    assert has_begun.wait(TIMEOUT_S)
    sandbox.close()
    thread.join(TIMEOUT_S)
    assert caught
    wait_until_ended(pid)
    with pytest.raises(NotWanted):
        sandbox.run(os.getpid, max_bytes=GIGABYTE)


def test_signals_to_the_whole_group_leave_the_process_to_the_server(sandbox: Sandbox) -> None:
    pid = sandbox.run(os.getpid, max_bytes=GIGABYTE)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert sandbox.run(os.getpid, max_bytes=GIGABYTE) == pid


def test_killed_server_leaves_no_process_even_in_a_call() -> None:
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert is_running(pid)
        server.kill()
    wait_until_ended(pid)


def test_what_runs_there_needs_no_torch(sandbox: Sandbox) -> None:
    outside = FieldSamples(3, np.arange(27, dtype=np.int32), np.full(27, -1, np.float32))
    with pytest.raises(EmptySurface):
        sandbox.run(make_mesh_file, outside, None, MeshFormat.GLB, max_bytes=GIGABYTE)
    with pytest.raises(InvalidImage):
        sandbox.run(partial(checked_image, max_pixels=1), b"no image", max_bytes=GIGABYTE)
    assert not sandbox.run(
        eval, "{'torch', 'pydantic', 'fastapi'} & set(__import__('sys').modules)", max_bytes=GIGABYTE
    )


def test_process_ends_quietly_when_the_server_is_gone() -> None:
    ours, theirs = Pipe()
    command = [sys.executable, "-m", "service.running.sandbox_process", str(theirs.fileno())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(theirs.fileno(),)
    ) as process:
        theirs.close()
        ours.send((abs, (-1,), 10**9))
        assert ours.recv()[0] == 1  # it runs
        ours.close()
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
