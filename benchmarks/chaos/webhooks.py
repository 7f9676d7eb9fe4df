"""A host of webhooks that answers badly, and remembers the calls."""

import base64
import hashlib
import hmac
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

_KEY = b"the key of the webhooks of a run"
SECRET = f"whsec_{base64.b64encode(_KEY).decode()}"
_DRIP_S = 0.2


class Behaviour(StrEnum):
    """How a webhook answers its first call. It answers 204 to all others."""

    WELL = "well"
    ERROR = "error"  # 500
    REDIRECT = "redirect"  # which must not be followed
    GARBAGE = "garbage"  # a body that is not the gzip that its headers announce
    DRIP = "drip"  # a body without an end, byte by byte
    HEADERS = "headers"  # headers without an end, byte by byte


@dataclass
class WebhookHost:
    """`calls` has the types of the calls for each job number; `faults` describes calls that were wrong."""

    calls: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    faults: list[str] = field(default_factory=list)
    address: str = ""

    def url(self, behaviour: Behaviour, number: int) -> str:
        return f"http://{self.address}/{behaviour}/{number}"

    def receive(self, path: str, headers: dict[str, str], body: bytes) -> bool:
        """Note a call. Whether it is the first of its job."""
        behaviour, _, number = path.strip("/").partition("/")
        if behaviour not in [*Behaviour]:
            self.faults.append(f"a webhook call went to {path}")
            return False
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        signature = base64.b64encode(hmac.digest(_KEY, signed, hashlib.sha256)).decode()
        call = json.loads(body)
        if headers["webhook-signature"] != f"v1,{signature}" or call["data"]["id"] != headers["webhook-id"]:
            self.faults.append(f"a webhook call of job {number} is not signed as that job's")
        calls = self.calls[int(number)]
        calls.append(call["type"])
        return len(calls) == 1


@contextmanager
def webhook_host() -> Iterator[WebhookHost]:
    host = WebhookHost()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            is_first = host.receive(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            with suppress(OSError):  # the caller has hung up
                _answer(self, Behaviour(self.path.split("/")[1]) if is_first else Behaviour.WELL)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False  # some answers have no end
        host.address = f"127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield host
        server.shutdown()


def _answer(call: BaseHTTPRequestHandler, behaviour: Behaviour) -> None:
    match behaviour:
        case Behaviour.WELL:
            call.send_response(204)
            call.end_headers()
        case Behaviour.ERROR:
            call.send_error(500)
        case Behaviour.REDIRECT:
            call.send_response(307)
            call.send_header("Location", "/followed/0")
            call.end_headers()
        case Behaviour.GARBAGE:
            call.send_response(200)
            call.send_header("Content-Encoding", "gzip")
            call.end_headers()
            call.wfile.write(b"this is not gzip")
        case Behaviour.DRIP:
            call.send_response(200)
            call.end_headers()
            _drip(call)
        case Behaviour.HEADERS:
            call.wfile.write(b"HTTP/1.0 200 OK\r\nX-Endless: ")
            _drip(call)


def _drip(call: BaseHTTPRequestHandler) -> None:
    """Send a byte now and then until the caller hangs up."""
    while True:
        call.wfile.write(b"a")
        time.sleep(_DRIP_S)
