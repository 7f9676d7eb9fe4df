"""Runs functions in a process of their own, which has a memory limit and can be ended at any time.

For work of seconds that holds the interpreter's lock or can't be interrupted, and for data that a client has made. The
process is `sandbox_process.py`. It imports what the functions need and no more, so it starts in a fraction of a second.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Lock
from typing import TypeVar, TypeVarTuple, cast

from service.errors import SandboxFailed

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""Every thread of NumPy's or torch's pools reserves memory, which the limit counts."""
_LOOK_S = 0.05
"""How often a running call looks if its result is still wanted."""


class NotWanted(Exception):
    """Nobody waits for the result any more."""


@dataclass(frozen=True, slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    connection: Connection


class Sandbox:
    """One process, started by the first call and again after it has ended. It runs one call at a time."""

    def __init__(self) -> None:
        self._lock = Lock()  # held by a call
        self._running: _Running | None = None
        self._is_closed = False

    def run(
        self,
        function: Callable[[*Arguments], Result],
        *arguments: *Arguments,
        max_bytes: int,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Result:
        """The result of `function`, which a module must have at its top level.

        `max_bytes` is for the process's own data, its imports included. Raises what the function raises, NotWanted as
        soon as `is_wanted` says no, and SandboxFailed if the memory does not suffice or the process ends.
        """
        with self._lock:
            result, error, trace = self._call((function, arguments, max_bytes), is_wanted)
            if isinstance(error, MemoryError):
                self._end()
                most = f"{max_bytes / 1e9:.1f} GB"
                raise SandboxFailed(f"its process needs more than the {most} of memory that it may have") from error
        if error is not None:
            error.add_note(trace)
            raise error
        return cast("Result", result)

    def close(self) -> None:
        """End the process. A running call raises NotWanted, and so do later ones. Any thread may call this."""
        self._is_closed = True
        with self._lock:
            if self._running is not None:
                self._end()

    def _call(self, call: object, is_wanted: Callable[[], bool]) -> tuple[object, BaseException | None, str]:
        """The answer of the process: a result, or an error and where it was raised. Needs the lock."""
        if self._running is not None and self._running.process.poll() is not None:
            self._end()  # it was killed between two calls, which is no fault of this one
        running = self._running or self._start()
        try:
            running.connection.send(call)
            while not running.connection.poll(_LOOK_S):
                if self._is_closed or not is_wanted():
                    raise NotWanted
            answer: tuple[object, BaseException | None, str] = running.connection.recv()
        except (EOFError, OSError) as ended:
            raise SandboxFailed(f"its process ended {_how(self._end())}") from ended
        except BaseException:
            self._end()
            raise
        return answer

    def _start(self) -> _Running:
        if self._is_closed:
            raise NotWanted
        ours, theirs = Pipe()
        settings_free = {name: value for name, value in os.environ.items() if not name.startswith("ELASTIC_")}
        # Not multiprocessing.Process, which would import the server's main module again.
        process = subprocess.Popen(
            [sys.executable, "-m", "service.running.sandbox_process", str(theirs.fileno())],
            stdin=subprocess.PIPE,  # ends with the server, however that ends
            pass_fds=(theirs.fileno(),),
            env={**settings_free, "PYTHONPATH": os.pathsep.join(sys.path), **_ONE_THREAD},
        )
        theirs.close()
        self._running = _Running(process, ours)
        return self._running

    def _end(self) -> int:
        """End the process, unless it has ended, and return its exit code. Needs the lock."""
        assert self._running is not None
        process, connection = self._running.process, self._running.connection
        self._running = None
        connection.close()
        process.kill()
        assert process.stdin is not None
        process.stdin.close()
        return process.wait()


def _how(code: int) -> str:
    return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
