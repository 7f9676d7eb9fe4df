import json
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from models.errors import InvalidRequest
from service.api.json_body import parse_json
from service.errors import InvalidJson

PICTURE = "aB+/" * 1000


def parse(body: str | bytes) -> dict[str, Any]:
    return parse_json(body if isinstance(body, bytes) else body.encode(), max_bytes=200, file_fields=("input_image",))


@pytest.mark.parametrize(
    "body",
    [
        f'{{"input_image": "{PICTURE}", "seed": 1}}',
        f'{{"seed": 1, "input_image"\n:\t"{PICTURE}"}}',
        json.dumps({"seed": 1, "input_image": PICTURE}, indent=8),
        f'{{"seed": 1, "input_image": "{PICTURE}"}}'.replace("/", "\\/").replace("+", "\\u002B"),
        f'\ufeff{{"seed": 1, "input_image": "{PICTURE}"}}',
    ],
    ids=["first", "last", "indented", "escaped", "byte order mark"],
)
def test_picture_may_be_longer_than_the_rest(body: str) -> None:
    assert parse(body) == {"seed": 1, "input_image": PICTURE}


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"input_image": "aa", "model": PICTURE}),
        json.dumps({"model": "x" * 200, "input_image": PICTURE}),
        json.dumps({"input_image": PICTURE, "model": "x" * 200}),
        '{"input_image": [' + "[]," * 100 + "[]]}",
        "[" * 300,
    ],
    ids=["another field", "before", "after", "array", "brackets"],
)
def test_everything_but_the_picture_is_limited(body: str) -> None:
    with pytest.raises(HTTPException, match="the body without input_image is larger than 200 bytes") as refused:
        parse(body)
    assert refused.value.status_code == 413


def test_body_without_a_picture_is_limited() -> None:
    with pytest.raises(HTTPException, match="the body is larger than 200 bytes"):
        parse_json(json.dumps({"input_image": PICTURE}).encode(), max_bytes=200)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty"),
        (b"{", "Expecting property name enclosed in double quotes at character 1"),
        ('{"prompt": "é"}'.encode("latin-1"), "not UTF-8: byte 0xe9 at position 12 .* encode the JSON as UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8: byte 0xff at position 0"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "too many digits"),
        (b'{"input_image": "' + b"a" * 200_000 + b'", "seed": }', "Expecting value at character 200028"),
        (b'{"input_image": "' + b"a" * 200_000 + b'\xe9"}', "not UTF-8: byte 0xe9 at position 200017"),
        (b'{"input_image": "' + b"a" * 200_000 + b'\\x"}', "Invalid .*escape.* at character 200017"),
        (b'{"input_image": "' + b"a" * 200_000 + b'\\""}', "not valid JSON: .* at character 200019"),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(body: bytes, message: str) -> None:
    with pytest.raises(InvalidJson, match=message):
        parse_json(body, max_bytes=100_000, file_fields=("input_image",))


@pytest.mark.parametrize("body", ["null", "[1]", '"a"', "1"])
def test_body_must_be_an_object(body: str) -> None:
    with pytest.raises(InvalidRequest, match="the body must be a JSON object, not "):
        parse(body)


@pytest.mark.parametrize(
    "fields",
    [
        {"image": PICTURE, "mask": PICTURE[:-4], "seed": 1},
        {"seed": 1, "image": [PICTURE, "", PICTURE[4:]], "prompt": 'an "image": [here]', "mask": PICTURE},
        {"images": [{"image_url": PICTURE}, {"image_url": PICTURE[8:]}], "mask": {"image_url": PICTURE[:800]}},
        {"image": ["a", "b"], "seed": 2, "mask": PICTURE},
    ],
    ids=["two fields", "a list", "objects", "short ones"],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_several_pictures_may_be_longer_than_the_rest(fields: dict[str, Any], indent: int | None) -> None:
    body = json.dumps(fields, indent=indent).encode()
    assert parse_json(body, max_bytes=250, file_fields=("image", "mask", "image_url")) == fields


def test_place_of_a_fault_after_several_pictures_is_that_in_the_body() -> None:
    body = json.dumps({"image": [PICTURE, PICTURE], "mask": PICTURE, "seed": 1}).encode()[:-2] + b"}"
    with pytest.raises(InvalidJson, match=f"Expecting value at character {len(body) - 1}"):
        parse_json(body, max_bytes=200, file_fields=("image", "mask"))


def test_many_short_pictures_count_as_the_rest() -> None:
    body = b'{"image": [' + b'"",' * 1_000_000 + b'""]}'
    with pytest.raises(HTTPException, match="the body without image, mask is larger than 1000 bytes"):
        parse_json(body, max_bytes=1000, file_fields=("image", "mask"))
