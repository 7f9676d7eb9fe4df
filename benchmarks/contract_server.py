"""The real server for `benchmarks.contract`: over sockets, with two API keys and the default limits.

What the OpenAPI document can't express is asked here by hand: bodies at and above the limits, and jobs of another key.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from pydantic import ValidationError

from examples.server_process import ElasticDit
from service.api.responses import ErrorBody
from service.keys import KeyEntry, Scope, new_key
from service.settings import Settings

ADMIN_KEY, _ADMIN = new_key("contract-admin", [Scope.ADMIN])
CLIENT_KEY, _CLIENT = new_key("contract-client", [Scope.GENERATE])
IMAGE_MODEL, MESH_MODEL = "tiny-flux", "tiny-hunyuan3d"
_RATE_LIMIT = "1000/minute"
_ANSWER_S = 120.0

Content = bytes | Iterable[bytes]


@contextmanager
def real_server() -> Iterator[str]:
    """The address of a server in a process of its own. Raises RuntimeError if it does not run any more at the end."""
    entries: list[KeyEntry] = [_ADMIN, _CLIENT]
    environment = {
        "ELASTIC_API_KEYS": f"[{', '.join(entry.model_dump_json() for entry in entries)}]",
        "ELASTIC_MODELS": f"{IMAGE_MODEL},{MESH_MODEL}",
        "ELASTIC_RATE_LIMIT": _RATE_LIMIT,
        "OMP_NUM_THREADS": "1",
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        ElasticDit("serve", Path(folder) / "server.log", **environment) as server,
    ):
        yield server.wait_until_ready()
        status = server.process.poll()
        if status is not None:
            raise RuntimeError(f"the server ended with status {status}:\n{server.end_of_log()}")


@dataclass(frozen=True, slots=True)
class LargeBody:
    """A body that tries a limit, and the codes of the errors that may answer it."""

    name: str
    path: str
    content_type: str
    content: Callable[[], Content]
    codes: frozenset[str]


def large_bodies(settings: Settings) -> list[LargeBody]:
    """Bodies at the limits of `settings`, and above them."""
    limit, mesh_limit = settings.max_body_bytes, settings.max_mesh_body_bytes
    edit_limit = settings.max_edit_body_bytes
    too_large, invalid = frozenset({"payload_too_large"}), frozenset({"invalid_parameter", "invalid_json"})
    images, meshes, edits = "/v1/images", "/v1/meshes", "/v1/images/edits"
    as_json, form = "application/json", "multipart/form-data; boundary=b"
    unreadable = frozenset({"invalid_image"})
    number = b'{"prompt": "x", "seed": %s}' % (b"9" * (limit // 2))
    return [
        LargeBody("a prompt within the limit", images, as_json, lambda: _prompt(limit), invalid),
        LargeBody("a prompt above the limit", images, as_json, lambda: _prompt(limit + 1), too_large),
        LargeBody("chunks above the limit", images, as_json, lambda: (b" " * 1000 for _ in range(limit)), too_large),
        LargeBody("nested lists", images, as_json, lambda: b"[" * limit, invalid),
        LargeBody("a long number", images, as_json, lambda: number, invalid),
        LargeBody("many fields", images, as_json, lambda: _fields(limit), invalid),
        LargeBody("an image within the limit", meshes, as_json, lambda: _input_image(mesh_limit), unreadable),
        LargeBody("an image above the limit", meshes, as_json, lambda: _input_image(mesh_limit + 1), too_large),
        LargeBody("a file within the limit", meshes, form, lambda: _form(mesh_limit), unreadable),
        LargeBody("a file above the limit", meshes, form, lambda: _form(mesh_limit + 1), too_large),
        LargeBody("pictures within the limit", edits, as_json, lambda: _pictures(edit_limit), unreadable),
        LargeBody("pictures above the limit", edits, as_json, lambda: _pictures(edit_limit + 1), too_large),
        LargeBody("many short pictures", edits, as_json, lambda: _short_pictures(limit), too_large),
        LargeBody("many parts", meshes, form, lambda: _part("seed", b"1") * 5000 + b"--b--\r\n", invalid | too_large),
    ]


def _prompt(size_bytes: int) -> bytes:
    frame = b'{"prompt": "%s"}'
    return frame.replace(b"%s", b"x" * (size_bytes - len(frame) + 2))


def _fields(size_bytes: int) -> bytes:
    return json.dumps({f"field{number:06}": 1 for number in range(size_bytes // 20)}).encode()


def _input_image(size_bytes: int) -> bytes:
    frame = b'{"input_image": "%s"}'
    return frame.replace(b"%s", b"A" * (size_bytes - len(frame) + 2))


def _pictures(size_bytes: int) -> bytes:
    """A picture and a mask."""
    frame = b'{"prompt": "x", "image": ["AAAA"], "mask": "%s"}'
    return frame.replace(b"%s", b"A" * (size_bytes - len(frame) + 2))


def _short_pictures(number: int) -> bytes:
    return b'{"prompt": "x", "image": [%s""]}' % (b'"",' * number)


def _part(name: str, content: bytes, extra: bytes = b"") -> bytes:
    return (
        b'--b\r\nContent-Disposition: form-data; name="'
        + name.encode()
        + b'"'
        + extra
        + b"\r\n\r\n"
        + content
        + b"\r\n"
    )


def _form(size_bytes: int) -> bytes:
    file = b'; filename="image.png"\r\nContent-Type: image/png'
    end = b"--b--\r\n"
    return _part("input_image", bytes(size_bytes - len(_part("input_image", b"", file) + end)), file) + end


def try_large_bodies(url: str) -> tuple[dict[str, str], list[str]]:
    """The answer to each large body, and what was wrong. Afterwards the server must be ready."""
    answers: dict[str, str] = {}
    faults = []
    for large in large_bodies(Settings()):
        headers = {"Authorization": f"Bearer {CLIENT_KEY}", "Content-Type": large.content_type}
        try:
            response = httpx2.post(url + large.path, content=large.content(), headers=headers, timeout=_ANSWER_S)
            code = error_code(response)
        except httpx2.TransportError as error:
            code = f"no answer: {error!r}"
        answers[large.name] = code
        if code not in large.codes:
            faults.append(f"{large.name} for {large.path} is answered {code}, not {' or '.join(sorted(large.codes))}")
    if (status := httpx2.get(f"{url}/readyz", timeout=_ANSWER_S).status_code) != 200:
        faults.append(f"after large bodies, /readyz answers {status}")
    return answers, faults


def error_code(response: httpx2.Response) -> str:
    """The code of an answer that is an error as the contract says."""
    try:
        return ErrorBody.model_validate(response.json()).error.code if response.is_error else str(response.status_code)
    except (ValueError, ValidationError):
        return f"{response.status_code} without an error object: {response.text[:200]}"


def try_foreign_jobs(url: str) -> list[str]:
    """Each call of one key that found the admin's job, or did something to it."""
    faults = []
    body = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 2}
    with httpx2.Client(base_url=url, timeout=_ANSWER_S) as client:
        admin, other = ({"Authorization": f"Bearer {key}"} for key in (ADMIN_KEY, CLIENT_KEY))
        job_id = client.post("/v1/images", json=body, headers=admin).raise_for_status().headers["X-Job-ID"]
        for method, rest in (("GET", ""), ("GET", "/events"), ("GET", "/content"), ("DELETE", "")):
            code = error_code(client.request(method, f"/v1/jobs/{job_id}{rest}", headers=other))
            if code != "job_not_found":
                faults.append(f"{method} /v1/jobs/…{rest} of another key's job is answered {code}")
        if (code := error_code(client.get("/metrics", headers=other))) != "insufficient_scope":
            faults.append(f"/metrics is answered {code} to a key without its scope")
    return faults
