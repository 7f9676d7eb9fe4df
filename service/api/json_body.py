"""Parses the JSON bodies of generation requests.

Everything in a body but pictures is small. A long body can hold millions of values, which take minutes and gigabytes,
and a parser in a thread holds the interpreter's lock meanwhile. So pictures are cut out before the rest is parsed, and
the rest has to be short.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from models.errors import InvalidRequest
from service.api.validation import shown
from service.errors import InvalidJson


@dataclass(frozen=True, slots=True)
class _Cut:
    """A text that was cut out of a body and its replacement in the rest, as they are written; and where both begin."""

    start: int
    start_in_rest: int
    text: bytes
    replacement: bytes

    @property
    def num_skipped(self) -> int:
        return len(self.text) - len(self.replacement)


def parse_json(body: bytes, *, max_bytes: int, file_fields: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a body that is a JSON object in UTF-8, without checking them.

    The texts of `file_fields`, or the texts in a list there, may have any length; everything else may have `max_bytes`.
    Fields of nested objects count too. Raises InvalidJson, InvalidRequest for JSON that is not an object, and
    HTTPException 413.
    """
    if not body:
        raise InvalidJson("the body is empty; it must be a JSON object")
    cuts: list[_Cut] = []
    if len(body) > max_bytes and file_fields:
        body, cuts = _cut_out(body, file_fields, max_bytes)
    if len(body) > max_bytes:
        raise too_long(max_bytes, file_fields)
    fields = _parsed(body, cuts)
    if not isinstance(fields, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {shown(fields)}", "")
    return fields


def too_long(max_bytes: int, file_fields: Sequence[str]) -> HTTPException:
    what = f"the body without {', '.join(file_fields)}" if file_fields else "the body"
    return HTTPException(413, f"{what} is larger than {max_bytes} bytes, the limit of this server")


def _cut_out(body: bytes, fields: Sequence[str], max_bytes: int) -> tuple[bytes, list[_Cut]]:
    """The body with a short text in place of each text of `fields`, up to where more than `max_bytes` are left of it.

    A text goes up to the next quotation mark. A picture has none, and if another text has, the rest is not valid JSON.
    """
    begin = re.compile(rb'"(?:%s)"\s*:\s*(\[?)\s*"' % "|".join(fields).encode())
    another = re.compile(rb'\s*,\s*"')
    nonce = secrets.token_hex(8).encode()
    kept: list[bytes] = []
    cuts: list[_Cut] = []
    place = num_kept = 0
    match = begin.search(body, 0, max_bytes)
    while match is not None and num_kept <= max_bytes:
        is_list = match.re is another or bool(match[1])
        end = body.find(b'"', match.end())
        if end < 0:
            break
        num_kept += match.end() - place
        cuts.append(_Cut(match.end(), num_kept, body[match.end() : end], b"%s-%d" % (nonce, len(cuts))))
        kept += [body[place : match.end()], cuts[-1].replacement]
        num_kept += len(cuts[-1].replacement)
        place = end
        last = place + max_bytes
        match = (another.match(body, place + 1, last) if is_list else None) or begin.search(body, place, last)
    return b"".join([*kept, body[place:]]), cuts


def _parsed(text: bytes, cuts: Sequence[_Cut] = (), *, num_before: int = 0) -> Any:
    """The value of a JSON text, with the texts of `cuts` put back.

    Errors count characters from the beginning of the body, where `num_before` bytes are before the text.
    """
    texts = {cut.replacement.decode(): cut for cut in cuts}

    def restored(value: Any) -> Any:
        cut = texts.get(value) if isinstance(value, str) else None
        return value if cut is None else _parsed(b'"' + cut.text + b'"', num_before=cut.start - 1)

    def with_texts(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        return {
            name: [restored(part) for part in value] if isinstance(value, list) else restored(value)
            for name, value in pairs
        }

    def place(position: int) -> int:
        return position + num_before + sum(cut.num_skipped for cut in cuts if cut.start_in_rest <= position)

    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=with_texts if cuts else None)
    except UnicodeDecodeError as error:
        given = f"byte 0x{text[error.start]:02x} at position {place(error.start)}"
        raise InvalidJson(f"the body is not UTF-8: {given} is {error.reason}; encode the JSON as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InvalidJson(f"the body is not valid JSON: {error.msg} at character {place(error.pos)}") from error
    except RecursionError as error:
        raise InvalidJson("the body is nested too deeply; objects in a request have one level below them") from error
    except ValueError as error:  # json converts no integers of more digits than sys.get_int_max_str_digits()
        raise InvalidJson("the body has a number with too many digits; no field takes more than 19") from error
