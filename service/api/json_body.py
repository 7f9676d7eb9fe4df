"""Parses the JSON bodies of generation requests.

Everything in a body but a picture is small. A long body can hold millions of values, which take minutes and gigabytes,
and a parser in a thread holds the interpreter's lock meanwhile. So a picture is cut out before the rest is parsed, and
the rest has to be short.
"""

import json
import re
from typing import Any

from starlette.exceptions import HTTPException

from models.errors import InvalidRequest
from service.api.validation import shown
from service.errors import InvalidJson


def parse_json(body: bytes, *, max_bytes: int, file_field: str | None = None) -> dict[str, Any]:
    """The fields of a body that is a JSON object in UTF-8, without checking them.

    The text of `file_field` may have any length; everything else may have `max_bytes`. Raises InvalidJson,
    InvalidRequest for JSON that is not an object, and HTTPException 413.
    """
    if not body:
        raise InvalidJson("the body is empty; it must be a JSON object")
    start, file = 0, b""
    if file_field is not None and len(body) > max_bytes:
        start, file = _find_text(body, file_field, within=max_bytes)
    if len(body) - len(file) > max_bytes:
        raise too_long(max_bytes, file_field)
    fields = _parsed(body[:start] + body[start + len(file) :], skipped_at=start, num_skipped=len(file))
    if not isinstance(fields, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {shown(fields)}", "")
    if file and file_field is not None:
        fields[file_field] = _parsed(b'"' + file + b'"', num_skipped=start - 1)
    return fields


def too_long(max_bytes: int, file_field: str | None) -> HTTPException:
    what = "the body" if file_field is None else f"the body without {file_field}"
    return HTTPException(413, f"{what} is larger than {max_bytes} bytes, the limit of this server")


def _find_text(body: bytes, field: str, *, within: int) -> tuple[int, bytes]:
    """Where the text of `field` begins, and the text as it is written; empty if it begins after `within` bytes.

    It goes up to the next quotation mark. A picture has none, and if another text has, the rest is not valid JSON.
    """
    match = re.compile(rb'"%s"\s*:\s*"' % field.encode()).search(body, 0, within)
    if match is None:
        return 0, b""
    end = body.find(b'"', match.end())
    return match.end(), b"" if end < 0 else body[match.end() : end]


def _parsed(text: bytes, *, skipped_at: int = 0, num_skipped: int = 0) -> Any:
    """The value of a JSON text. Errors count characters from the beginning of the body that it was cut out of."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        position = error.start + num_skipped * (error.start >= skipped_at)
        given = f"byte 0x{text[error.start]:02x} at position {position}"
        raise InvalidJson(f"the body is not UTF-8: {given} is {error.reason}; encode the JSON as UTF-8") from error
    except json.JSONDecodeError as error:
        position = error.pos + num_skipped * (error.pos >= skipped_at)
        raise InvalidJson(f"the body is not valid JSON: {error.msg} at character {position}") from error
    except RecursionError as error:
        raise InvalidJson("the body is nested too deeply; objects in a request have one level below them") from error
    except ValueError as error:  # json converts no integers of more digits than sys.get_int_max_str_digits()
        raise InvalidJson("the body has a number with too many digits; no field takes more than 19") from error
