"""Logging of the whole process: one line an event, on stderr. Prompts and keys are never logged."""

import json
import logging
import re
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum

# The id of the current request, for every line that is logged while it is handled.
current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)

# The fields besides the message that a line may have, given by `extra`.
_FIELDS = ("request_id", "job_id", "key_id", "method", "route", "status", "seconds")


class LogLevel(StrEnum):
    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = ((name, getattr(record, name, None)) for name in ("job_id", "request_id"))
        return super().formatMessage(record) + "".join(f" {name}={value}" for name, value in fields if value)


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name in _FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def add_request_id(record: logging.LogRecord) -> bool:
    """A filter that adds the current request's id to lines without one, and drops nothing."""
    if not hasattr(record, "request_id"):
        record.request_id = current_request_id.get()
    return True


def configure_logging(level: LogLevel, log_format: LogFormat = LogFormat.TEXT) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(add_request_id)
    handler.setFormatter(JsonFormatter() if log_format is LogFormat.JSON else TextFormatter())
    logging.basicConfig(level=level.value, handlers=[handler])


# transformers logs this whenever diffusers imports an image processor. The fallback is what we want: no torchvision.
_TORCHVISION_FALLBACK = re.compile(r"`\w+ImageProcessor` requires torchvision \(not installed\); falling back to")


def ignore_torchvision_fallback() -> None:
    """Drop the warning that transformers falls back to Pillow without torchvision; its other warnings stay."""
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_no_torchvision_fallback)


def _is_no_torchvision_fallback(record: logging.LogRecord) -> bool:
    return _TORCHVISION_FALLBACK.match(record.getMessage()) is None
