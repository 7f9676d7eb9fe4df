"""The one table from error types to HTTP status and code, and the handlers that answer errors."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount

from models.errors import InvalidRequest, UnknownModel
from service.api.responses import ErrorBody, ErrorDetail, header
from service.api.validation import cut, invalid_request
from service.errors import (
    CrossSiteCall,
    DeadlineUnreachable,
    Draining,
    GenerationFailed,
    HostNotAllowed,
    IdempotencyKeyReused,
    InsufficientScope,
    InvalidApiKey,
    InvalidImage,
    InvalidJson,
    InvalidLink,
    JobCancelled,
    JobNotFinished,
    JobNotFound,
    JobUnreadable,
    LinkExpired,
    MalformedRequest,
    ModelNotLoadable,
    ModelUnavailable,
    Overloaded,
    RateLimitExceeded,
    ResultExpired,
    ServiceError,
    StoreUnavailable,
    UnsupportedMediaType,
)
from service.jobs.job import Failure, FailureReason, JobSnapshot, JobStatus

STATUS_AND_CODE: Mapping[type[Exception], tuple[int, str]] = {
    MalformedRequest: (400, "invalid_request"),
    InvalidJson: (400, "invalid_json"),
    InvalidImage: (400, "invalid_image"),
    InvalidApiKey: (401, "invalid_api_key"),
    InsufficientScope: (403, "insufficient_scope"),
    InvalidLink: (403, "invalid_link"),
    LinkExpired: (403, "link_expired"),
    HostNotAllowed: (403, "host_not_allowed"),
    CrossSiteCall: (403, "cross_site_call"),
    UnknownModel: (404, "model_not_found"),
    JobNotFound: (404, "job_not_found"),
    JobNotFinished: (409, "job_not_finished"),
    JobCancelled: (409, "job_cancelled"),
    ResultExpired: (410, "result_expired"),
    UnsupportedMediaType: (415, "unsupported_media_type"),
    InvalidRequest: (422, "invalid_parameter"),
    DeadlineUnreachable: (422, "deadline_unreachable"),
    ModelNotLoadable: (422, "model_not_loadable"),
    IdempotencyKeyReused: (422, "idempotency_key_reused"),
    RateLimitExceeded: (429, "rate_limit_exceeded"),
    GenerationFailed: (500, "generation_failed"),
    JobUnreadable: (500, "generation_failed"),
    Overloaded: (503, "overloaded"),
    ModelUnavailable: (503, "model_unavailable"),
    Draining: (503, "draining"),
    StoreUnavailable: (503, "store_unavailable"),
}

# Errors that the framework and the middlewares raise: an unknown path or method, a body that is too long or too slow,
# bodies that are too long together.
_FRAMEWORK_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "payload_too_large",
    503: "overloaded",
}

MAX_MESSAGE_CHARACTERS = 600
"""Messages cut the values that they repeat; this holds for any message all the same."""

_RETRY_AFTER = {"Retry-After": header("Seconds to wait before the next try.", type="integer", minimum=0)}
_HEADERS = {401: {"WWW-Authenticate": header("Bearer.")}, 429: _RETRY_AFTER, 503: _RETRY_AFTER}


def status_and_error(error: Exception) -> tuple[int, ErrorDetail]:
    """The HTTP status and the body of the answer to `error`."""
    match error:
        case RequestValidationError():
            return status_and_error(invalid_request(error.errors()[0], skip=1))
        case HTTPException():
            code = _FRAMEWORK_CODES.get(error.status_code, "invalid_request")
            return error.status_code, _detail(error.status_code, code, str(error.detail))
        case _ if type(error) in STATUS_AND_CODE:
            status, code = STATUS_AND_CODE[type(error)]
            param = (
                error.param
                if isinstance(error, InvalidRequest | InvalidImage | IdempotencyKeyReused | DeadlineUnreachable)
                else None
            )
            return status, _detail(status, code, str(error), param or None)
        case _:
            return 500, _detail(500, "internal_error", "the server failed on this request")


def error_of(failure: Failure) -> Exception:
    """The error to answer for a job that failed."""
    match failure.reason:
        case FailureReason.INVALID_REQUEST:
            return InvalidRequest(failure.message, failure.param or "")
        case FailureReason.GENERATION_FAILED | FailureReason.WORKER_LOST:
            return GenerationFailed(failure.message)
        case FailureReason.DRAINING:  # the grace period is over: another server may answer at once
            return Draining(failure.message, retry_after_s=1)


def raise_if_unsuccessful(ended: JobSnapshot) -> None:
    """Raise the error that tells the client why a job that has ended has no result."""
    if ended.state.failure is not None:
        raise error_of(ended.state.failure)
    if ended.state.status is JobStatus.CANCELLED:
        raise JobCancelled(f"job {ended.job.id} was cancelled")


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    status, detail = status_and_error(error)
    headers: dict[str, str] = {}
    if isinstance(error, ServiceError) and error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, InvalidApiKey):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, HTTPException) and error.headers:
        headers.update(error.headers)
    if "Allow" in headers:
        headers["Allow"] = _allowed_methods(request) or headers["Allow"]
    return JSONResponse(ErrorBody(error=detail).model_dump(), status, headers)


def add_error_handlers(app: FastAPI) -> None:
    for error_type in (*STATUS_AND_CODE, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(error_type, answer_error)


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route in the OpenAPI document."""
    codes = dict.fromkeys((*STATUS_AND_CODE.values(), *_FRAMEWORK_CODES.items()))  # each once, in this order
    return {
        wanted: {
            "model": ErrorBody,
            "description": ", ".join(code for status, code in codes if status == wanted),
            **({"headers": _HEADERS[wanted]} if wanted in _HEADERS else {}),
        }
        for wanted in statuses
    }


def _allowed_methods(request: Request) -> str:
    """All methods of a path. Starlette names only the methods of the first route with this path."""
    return ", ".join(
        "GET, HEAD" if method == "GET" else method  # see `HeadAsGet`
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
            if not isinstance(route, Mount)  # which takes all methods, and knows better itself
        )
    )


def _detail(status: int, code: str, message: str, param: str | None = None) -> ErrorDetail:
    return ErrorDetail(
        message=cut(message, MAX_MESSAGE_CHARACTERS),
        type="server_error" if status >= 500 else "invalid_request_error",
        param=None if param is None else cut(param),
        code=code,
    )
