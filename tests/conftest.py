"""Settings for all tests, and how they are shared out among pytest's processes."""

import os

import pytest
from hypothesis import settings

from tests.fixtures.hostile_images import hostile_pictures
from tests.fixtures.redis import redis_server

__all__ = ["hostile_pictures", "redis_server"]

SERVER_FIXTURES = {"server", "own_server", "redis_server"}

# torch reads this when it is imported. Tests and the servers they start run side by side: one thread each.
os.environ["OMP_NUM_THREADS"] = "1"

# Run the same examples every time, without a deadline: on a loaded machine one example may take a second.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start servers, and keep on one process the tests that share something expensive."""
    for item in items:
        if SERVER_FIXTURES & {*_fixtures(item)} or item.get_closest_marker("redis"):
            item.add_marker("server")
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    # The longest groups first: tests of running servers, then those of a whole model.
    items.sort(key=lambda item: (item.get_closest_marker("server") is None, "kind" not in _parameters(item)))


def _group(item: pytest.Item) -> str:
    """The shared server, the model a test runs for, or else its file."""
    if "server" in _fixtures(item):
        return "server"
    if kind := _parameters(item).get("kind"):
        return f"kind {kind}"
    return item.path.stem


def _fixtures(item: pytest.Item) -> list[str]:
    return item.fixturenames if isinstance(item, pytest.Function) else []


def _parameters(item: pytest.Item) -> dict[str, object]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec is not None else {}
