"""Turns pydantic's errors into ours, which name the value, the limits, and the nearest valid value."""

import reprlib
from collections.abc import Mapping
from typing import Any

from models.errors import InvalidRequest

MAX_SHOWN_CHARACTERS = 60

_brief = reprlib.Repr()


def invalid_request(error: Mapping[str, Any], *, skip: int = 0) -> InvalidRequest:
    """Our error for one `error` of a ValidationError. The first `skip` parts of its location do not name a field."""
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"][skip:]).lstrip(".")
    return InvalidRequest(_message(error, param or "the body"), param)


def _message(error: Mapping[str, Any], name: str) -> str:
    limits = error.get("ctx", {})
    given = shown(error["input"])
    match error["type"]:
        case "missing":
            return f"{name} is required"
        case "unknown_field":
            hint = f"; did you mean {limits['nearest']}?" if limits["nearest"] else ""
            return f"unknown field {cut(name)}{hint}"
        case "less_than_equal":
            return f"{name} {given} is above {limits['le']}; try {limits['le']}"
        case "greater_than_equal":
            return f"{name} {given} is below {limits['ge']}; try {limits['ge']}"
        case "greater_than":
            return f"{name} {given} is not above {limits['gt']}"
        case "enum" | "literal_error":
            return f"{name} {given} is not one of {limits['expected']}"
        case "string_too_short":
            return f"{name} is empty; it needs at least one character"
        case "model_attributes_type" | "model_type" | "dict_type":
            return f"{name} must be a JSON object, not {given}"
        case "unsupported" | "budget_form" | "budget_floor":
            return str(error["msg"])
        case "value_error":
            reason = error["msg"].removeprefix("Value error, ")
            return f"{name} {given} is not valid: {reason}" if error["loc"] else reason
        case "byte_size" | "byte_size_unit":
            return f"{name} {given} is no number of bytes, such as 24GiB"
        case _:
            return f"{name} {given} is not valid: {error['msg'].lower()}"


def shown(value: object) -> str:
    """`value` as a message repeats it: some MAX_SHOWN_CHARACTERS of it at most, whatever its size and depth."""
    return cut(repr(value[: MAX_SHOWN_CHARACTERS + 1]) if isinstance(value, str) else _brief.repr(value))


def cut(text: str, max_characters: int = MAX_SHOWN_CHARACTERS) -> str:
    """The beginning of `text`, as UTF-8 can spell it: JSON can name half surrogate pairs."""
    text = text if len(text) <= max_characters else text[:max_characters] + "…"
    return text.encode("utf-8", "backslashreplace").decode()
