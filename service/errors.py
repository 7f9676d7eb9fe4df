"""The errors of the service itself.

ServiceError
├── BadConfiguration      settings that cannot work; the server does not start
├── Broken                a part of the server failed for good; the process ends
├── InvalidApiKey         the call has no key that this server knows
├── InvalidLink           the call comes with a signature that is not that of this link
├── LinkExpired           the time of the signed link is over
├── InsufficientScope     the key does not have the scope that the call needs
├── HostNotAllowed        the call names a host that this server does not answer for
├── CrossSiteCall         a page of another site calls through a browser
├── RateLimitExceeded     the caller has called too often; has the time of the next try
├── MalformedRequest      the HTTP request contradicts itself
├── UnsupportedMediaType  the call does not accept bodies of this media type or encoding
├── InvalidJson           the body is not JSON in UTF-8
├── InvalidImage          an input image cannot be read, or exceeds a limit
├── ModelUnavailable      no worker holds the model now; has the time of the next try
├── ModelNotLoadable      a model can't be loaded: its directory is broken, or there is no room for it
├── Overloaded            the predicted backlog is too long; has the time of the next try
├── DeadlineUnreachable   even the lowest allowed quality would take too long
├── Draining              the server is shutting down
├── StoreUnavailable      the job store or the results cannot be reached
├── JobNotFound           no such job, or its record has been deleted
├── JobUnreadable         the job's record is broken
├── JobNotFinished        the job has no content, or not yet
├── JobCancelled          the job was cancelled while this call waited for it
├── IdempotencyKeyReused  an earlier call with this key had another body
├── ResultExpired         the job's content has been deleted
├── GenerationFailed      the engine failed on this job
└── SandboxFailed         a process of this server ended, or needed too much memory
"""

from typing import Self


class ServiceError(Exception):
    """Clients see the message. `retry_after_s`, if set, is the number of seconds to wait before the next try."""

    retry_after_s: int | None = None


class BadConfiguration(ServiceError):
    pass


class Broken(ServiceError):
    pass


class InvalidApiKey(ServiceError):
    pass


class InvalidLink(ServiceError):
    pass


class LinkExpired(ServiceError):
    pass


class InsufficientScope(ServiceError):
    pass


class HostNotAllowed(ServiceError):
    pass


class CrossSiteCall(ServiceError):
    pass


class RateLimitExceeded(ServiceError):
    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class MalformedRequest(ServiceError):
    pass


class UnsupportedMediaType(ServiceError):
    pass


class InvalidJson(ServiceError):
    pass


class InvalidImage(ServiceError):
    """`param` names the field of the image, with which the message begins."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        """It is raised in other processes too."""
        return type(self), (str(self), self.param)


class ModelUnavailable(ServiceError):
    """`model` is empty if there is no model of the kind that was asked for."""

    def __init__(self, message: str, model: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.model = model
        self.retry_after_s = retry_after_s


class ModelNotLoadable(ServiceError):
    pass


class Overloaded(ServiceError):
    retry_after_s: int

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(ServiceError):
    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineUnreachable(ServiceError):
    param = "budget.latency_ms"


class JobNotFound(ServiceError):
    pass


class JobUnreadable(ServiceError):
    def __init__(self, job_id: str) -> None:
        super().__init__(f"the record of job {job_id} can't be read; send the request again")


class JobNotFinished(ServiceError):
    pass


class ResultExpired(ServiceError):
    pass


class GenerationFailed(ServiceError):
    pass


class SandboxFailed(ServiceError):
    pass


class StoreUnavailable(ServiceError):
    retry_after_s = 2


class JobCancelled(ServiceError):
    pass


class IdempotencyKeyReused(ServiceError):
    param = "Idempotency-Key"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"an earlier call with the Idempotency-Key {key!r} had another body; a new request needs a new key"
        )
