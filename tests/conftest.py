"""Settings for all tests, and how they are shared out among pytest's processes."""

import os
from typing import Any

import pytest
from hypothesis import settings

from tests.fixtures.hostile_images import hostile_images
from tests.fixtures.redis import redis_server
from tests.fixtures.scheduling import SharingScheduling

__all__ = ["hostile_images", "redis_server"]

SERVER_FIXTURES = {"server", "own_server", "reached", "redis_server"}

# torch reads this when it is imported. Tests and the servers they start run side by side: one thread each.
os.environ["OMP_NUM_THREADS"] = "1"

# Starlette's test client calls the server by this name.
os.environ["ELASTIC_ALLOWED_HOSTS"] = "testserver"

# Run the same examples every time, without a deadline: on a loaded machine one example may take a second.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start servers, and run them first: they take longest."""
    for item in items:
        fixtures = item.fixturenames if isinstance(item, pytest.Function) else []
        if SERVER_FIXTURES & {*fixtures} or item.get_closest_marker("redis"):
            item.add_marker("server")
    items.sort(key=lambda item: item.get_closest_marker("server") is None)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SharingScheduling:
    return SharingScheduling(config, log)
