"""The bodies that the contract's benchmark sends to the real server."""

import httpx2
import pytest

from benchmarks.contract_server import error_code, large_bodies
from service.settings import Settings

SETTINGS = Settings(max_body_bytes=1000, max_mesh_body_bytes=3000, max_edit_body_bytes=4000)


@pytest.mark.parametrize(
    ("name", "size_bytes"),
    [
        ("a prompt within the limit", 1000),
        ("a prompt above the limit", 1001),
        ("an image within the limit", 3000),
        ("an image above the limit", 3001),
        ("pictures within the limit", 4000),
        ("pictures above the limit", 4001),
        ("a file within the limit", 3000),
        ("a file above the limit", 3001),
    ],
)
def test_bodies_are_exactly_at_the_limits(name: str, size_bytes: int) -> None:
    (content,) = [large.content() for large in large_bodies(SETTINGS) if large.name == name]
    assert isinstance(content, bytes)
    assert len(content) == size_bytes


def test_answer_without_an_error_object_is_told_from_one_with_it() -> None:
    error = {"error": {"message": "too large", "type": "invalid_request_error", "param": None, "code": "too_large"}}
    assert error_code(httpx2.Response(413, json=error)) == "too_large"
    assert "without an error object" in error_code(httpx2.Response(413, json={"detail": "too large"}))
    assert error_code(httpx2.Response(200, json={})) == "200"
