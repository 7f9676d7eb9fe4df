"""What the service itself answers no with.

ServiceError
├── BadConfiguration      what the operator has set can't work; the server does not start
├── InvalidApiKey         no key that this server knows
├── InsufficientScope     the key is not for this
├── RateLimitExceeded     this caller has called too often; says when to come back
├── UnsupportedMediaType  the body is not of a type that the call takes
├── InvalidImage          the picture can't be read, or is more than this server takes
├── Overloaded            the predicted backlog is too long; says when to come back
├── DeadlineUnreachable   even the lowest quality allowed would take too long
├── Draining              the server is shutting down
├── StoreUnavailable      Redis, or where results are kept, can't be reached
├── JobNotFound           no such job, or forgotten since
├── JobNotFinished        the job has no content, or not yet
├── JobCancelled          somebody cancelled the job while this call waited for it
├── IdempotencyKeyReused  the key came before, with another body
├── ResultExpired         the job's content is no longer kept
└── GenerationFailed      the engine failed on this job
"""


class ServiceError(Exception):
    """The message is fit for a client to read. `retry_after_s`, where set, is when trying again may help."""

    retry_after_s: int | None = None


class BadConfiguration(ServiceError):
    pass


class InvalidApiKey(ServiceError):
    pass


class InsufficientScope(ServiceError):
    pass


class RateLimitExceeded(ServiceError):
    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnsupportedMediaType(ServiceError):
    pass


class InvalidImage(ServiceError):
    param = "input_image"


class Overloaded(ServiceError):
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


class JobNotFinished(ServiceError):
    pass


class ResultExpired(ServiceError):
    pass


class GenerationFailed(ServiceError):
    pass


class StoreUnavailable(ServiceError):
    retry_after_s = 2


class JobCancelled(ServiceError):
    pass


class IdempotencyKeyReused(ServiceError):
    param = "Idempotency-Key"

    def __init__(self, key: str) -> None:
        super().__init__(f"the Idempotency-Key {key!r} came before, with another body; a new request needs a new key")
