"""The process of a `Sandbox`: `python -m service.running.sandbox_process FD`. It answers calls over a socket."""

import os
import resource
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

_NICENESS = 10


def main(descriptor: int) -> None:
    # A terminal's Ctrl-C and a service manager's SIGTERM come to the whole group. The server ends this process itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Thread(target=_end_with_the_server, daemon=True).start()
    os.nice(_NICENESS)  # steps, images and answers of the server come first where they compete for a core
    with suppress(OSError):  # Linux: where memory runs out, this process goes before the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    connection = Connection(descriptor)
    with suppress(EOFError, ConnectionError):  # the server has ended
        while True:
            connection.send(_answer(connection))


def _answer(connection: Connection) -> tuple[object, BaseException | None, str]:
    """The result of the next call, or its error and where it was raised."""
    function, arguments, max_bytes = connection.recv()
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (max_bytes if most < 0 else min(max_bytes, most), most))
    try:
        return function(*arguments), None, ""
    except Exception as error:
        return None, error, traceback.format_exc()


def _end_with_the_server() -> None:
    # Not sys.stdin, whose lock this thread would hold: Python aborts if that happens while it ends.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
