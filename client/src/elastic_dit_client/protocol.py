"""The HTTP contract: the calls that a client sends, and the results, events and errors in the answers."""

import base64
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx2

# The server sends at least one line every 15 seconds in a stream, and answers calls that do not generate at once.
SILENCE_S = 60.0

_IMAGES, _EDITS, _MESHES = "/v1/images", "/v1/images/edits", "/v1/meshes"
_ASYNC = {"Prefer": "respond-async"}
_OWN_FIELDS = {"stream", "response_format"}
_PAGE = 100
_TERMINAL = {"succeeded", "failed", "cancelled"}


File = bytes | Path
Files = File | Sequence[File]


class ApiError(Exception):
    """The server refused a call, or a job failed.

    `code` is stable and tells errors apart; the OpenAPI document lists the codes. It is None if a proxy answered in
    place of the server. `status` is the HTTP status. It is None for an error at the end of a job's events, whose call
    had already been answered.
    """

    def __init__(
        self,
        status: int | None,
        code: str | None,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(status, code, message, param, retry_after_s, request_id)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    def __str__(self) -> str:
        parts = [str(part) for part in (self.status, self.code) if part is not None]
        return f"{' '.join(parts)}: {self.message}" if parts else self.message


@dataclass(frozen=True, slots=True)
class Result:
    """The artifacts of a job: one file and one seed for each image, or for the mesh.

    `receipt` says what the server computed: compute ratio, decisions, seconds.
    """

    job_id: str
    model: str
    files: tuple[bytes, ...]
    seeds: tuple[int, ...]
    output_format: str
    receipt: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """`status` is queued, running, succeeded, failed or cancelled. `error` says why it failed, as the server does.

    `step` of `num_computed_steps` are done, the mean over several images; a deadline may change `num_computed_steps`.
    The other ones of `num_inference_steps` are forecast.

    While the job is queued, `position` jobs of its model come first, and it is predicted to end in `eta_s` seconds.
    `eta_s` is None while no worker has the model.
    """

    id: str
    status: str
    step: int
    num_computed_steps: int
    num_inference_steps: int
    receipt: dict[str, Any] | None
    error: dict[str, Any] | None
    position: int | None = None
    eta_s: float | None = None

    @property
    def is_terminal(self) -> bool:
        return self.status in _TERMINAL


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """`id` can be passed to `events` as `after`, to go on after this event. `data` is the event's JSON."""

    name: str
    id: str | None
    data: dict[str, Any]

    @property
    def is_last(self) -> bool:
        """Whether it has the whole result. The events before it may have finished images of the same job."""
        return self.name.endswith(".completed") and "data" in self.data

    @property
    def file(self) -> bytes | None:
        """The image or mesh in the event: a preview, or an artifact, whose place in the job is `data["index"]`."""
        return base64.b64decode(self.data["b64_json"]) if "b64_json" in self.data else None

    @property
    def result(self) -> Result | None:
        """The result, if this is the last event."""
        return result_of(self.data) if self.is_last else None


@dataclass(frozen=True, slots=True)
class Call:
    """An HTTP request. `silence_s` limits how long the server may send nothing; None allows all of the call's time."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_stream: bool = False
    silence_s: float | None = SILENCE_S


def image_call(prompt: str, fields: Mapping[str, Any]) -> Call:
    return _generation_call(_IMAGES, {"prompt": prompt, **fields})


def edit_call(images: Files, prompt: str, mask: File | None, fields: Mapping[str, Any]) -> Call:
    """Reads the files."""
    listed = [images] if isinstance(images, bytes | Path) else images
    masks = {} if mask is None else {"mask": _text_of(mask)}
    return _generation_call(
        _EDITS, {"image": [_text_of(image) for image in listed], "prompt": prompt, **masks, **fields}
    )


def mesh_call(image: File, fields: Mapping[str, Any]) -> Call:
    """Reads the file."""
    return _generation_call(_MESHES, {"input_image": _text_of(image), **fields})


def _text_of(file: File) -> str:
    data = file.read_bytes() if isinstance(file, Path) else file
    return base64.b64encode(data).decode("ascii")


def _generation_call(path: str, fields: Mapping[str, Any]) -> Call:
    if own := _OWN_FIELDS & fields.keys():
        raise ValueError(
            f"{', '.join(sorted(own))}: the client sets this field; call generate, stream or submit instead"
        )
    body = {**fields, "response_format": "b64_json"}  # a server may have another default
    return Call("POST", path, body, {"Idempotency-Key": str(uuid.uuid4())}, silence_s=None)


def submitting(call: Call) -> Call:
    """The call, answered at once with the job."""
    return replace(call, headers={**call.headers, **_ASYNC}, silence_s=SILENCE_S)


def streaming(call: Call) -> Call:
    """The call, answered with the job's events."""
    return replace(call, body={**(call.body or {}), "stream": True}, is_stream=True, silence_s=SILENCE_S)


def finding(call: Call) -> Call:
    """A call that is answered at once with the id of the job that `call` made: its key and body are those of `call`."""
    return call if call.is_stream else submitting(call)


def job_path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def job_call(job_id: str) -> Call:
    return Call("GET", job_path(job_id))


def jobs_call(after: str | None, all_keys: bool) -> Call:
    query = {"limit": _PAGE, **({} if after is None else {"after": after}), **({"all": "true"} if all_keys else {})}
    return Call("GET", f"/v1/jobs?{urlencode(query)}")


def cancel_call(job_id: str) -> Call:
    return Call("DELETE", job_path(job_id))


def content_call(job_id: str, index: int) -> Call:
    return Call("GET", f"{job_path(job_id)}/content?index={index}")


def models_call() -> Call:
    return Call("GET", "/v1/models")


def result_of(body: Mapping[str, Any]) -> Result:
    return Result(
        job_id=body["id"],
        model=body["model"],
        files=tuple(base64.b64decode(file["b64_json"]) for file in body["data"]),
        seeds=tuple(file["seed"] for file in body["data"]),
        output_format=body["output_format"],
        receipt=body["receipt"],
    )


def job_of(body: Mapping[str, Any]) -> Job:
    progress = body["progress"]
    return Job(
        id=body["id"],
        status=body["status"],
        step=progress["step"],
        num_computed_steps=progress["num_computed_steps"],
        num_inference_steps=progress["num_inference_steps"],
        receipt=body["receipt"],
        error=body["error"],
        **(body.get("queue") or {}),  # older servers have none
    )


def job_id_of(response: httpx2.Response) -> str:
    """The job's id from any answer to a POST; a stream does not have to be read for it."""
    return str(response.headers.get("X-Job-ID") or response.json()["id"])


def models_of(response: httpx2.Response) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = response.json()["data"]
    return models


def error_of(response: httpx2.Response) -> ApiError:
    try:
        error = response.json()["error"]
        code, message, param = error.get("code"), error["message"], error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):  # a proxy answered
        code, message, param = None, response.text[:500] or response.reason_phrase, None
    request_id = response.headers.get("X-Request-ID")
    return ApiError(response.status_code, code, message, param, _retry_after_s(response), request_id)


def _retry_after_s(response: httpx2.Response) -> float | None:
    """`Retry-After` in seconds: RFC 9110, section 10.2.3, allows seconds or a date.

    A date is compared with the answer's `Date`, which is the server's clock, if it has one.
    """
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    due = _date_of(value)
    if due is None:
        return None
    now = _date_of(response.headers.get("Date", "")) or datetime.now(UTC)
    return max(0.0, (due - now).total_seconds())


def _date_of(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
