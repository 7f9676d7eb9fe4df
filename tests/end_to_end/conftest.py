"""The server as people run it: a process of its own, on a free port, with the models that ship with the repository."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.server_process import ElasticDit
from tests.fixtures.forked_server import ForkedElasticDit


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that tests share."""
    process = ElasticDit("serve", tmp_path_factory.mktemp("server") / "log")
    yield process.wait_until_ready()
    process.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Callable[..., ForkedElasticDit]]:
    """Start a server for this test alone, with environment variables; it is killed after the test."""
    processes = []

    def start(**environment: str) -> ForkedElasticDit:
        process = ForkedElasticDit("serve", tmp_path / "log", **environment)
        processes.append(process)
        process.wait_until_ready()
        return process

    yield start
    for process in processes:
        process.kill()
