"""What the service itself answers no with.

ServiceError
├── UnsupportedMediaType  the body is not of a type that the call takes
├── InvalidImage          the picture can't be read, or is more than this server takes
├── Overloaded            the predicted backlog is too long; says when to come back
├── Draining              the server is shutting down
├── JobNotFound           no such job, or forgotten since
├── JobNotFinished        the job has no content, or not yet
├── ResultExpired         the job's content is no longer kept
└── GenerationFailed      the engine failed on this job
"""


class ServiceError(Exception):
    """The message is fit for a client to read. `retry_after_s`, where set, is when trying again may help."""

    retry_after_s: int | None = None


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


class JobNotFound(ServiceError):
    pass


class JobNotFinished(ServiceError):
    pass


class ResultExpired(ServiceError):
    pass


class GenerationFailed(ServiceError):
    pass
