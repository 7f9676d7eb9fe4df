"""Job events as a browser's EventSource gets them: it connects again until it is answered with another status than 200.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from collections.abc import Iterator
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient

from service.app import build_dispatcher, create_app
from service.errors import StoreUnavailable
from service.jobs.store import EVENTS_TTL_S
from service.running.dispatcher import Dispatcher
from service.settings import Settings

MAX_CONNECTIONS = 5
ASYNC = {"Prefer": "respond-async"}


class EventSource:
    """`statuses` has one status for each connection, `names` the events of all of them."""

    def __init__(self, client: TestClient, url: str) -> None:
        self.client, self.url = client, url
        self.names: list[str] = []
        self.statuses: list[int] = []
        self.last_id = ""

    def connect(self) -> int:
        """Read one connection to its end."""
        response = self.client.get(self.url, headers={"Last-Event-ID": self.last_id} if self.last_id else {})
        self.statuses.append(response.status_code)
        for block in response.text.split("\n\n") if response.status_code == 200 else ():
            for line in block.splitlines():
                field, _, value = line.partition(": ")
                if field == "event":
                    self.names.append(value)
                elif field == "id":
                    self.last_id = value
        return response.status_code

    def run(self) -> None:
        while self.connect() == 200:
            assert len(self.statuses) < MAX_CONNECTIONS, "it connects for ever"


@pytest.fixture
def now() -> list[float]:
    """The time by the store's clock."""
    return [1_700_000_000.0]


@pytest.fixture
def dispatcher(engine: Any, now: list[float]) -> Dispatcher:
    dispatcher = build_dispatcher(Settings(grace_s=0), lambda: engine, clock=lambda: now[0])
    dispatcher.worker.start()
    return dispatcher


@pytest.fixture
def client(dispatcher: Dispatcher) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(grace_s=0), dispatcher)) as client:
        yield client


def events_url(client: TestClient, prompt: str = "a") -> str:
    """The events of a job that has ended."""
    answer = client.post("/v1/images", json={"prompt": prompt}, headers=ASYNC).json()
    client.get(answer["links"]["events"])
    return cast(str, answer["links"]["events"])


@pytest.mark.parametrize(("prompt", "last"), [("a", "image_generation.completed"), ("break at step", "error")])
@pytest.mark.parametrize("are_deleted", [False, True])
def test_it_gets_the_end_of_a_job_once_and_stops(
    are_deleted: bool, prompt: str, last: str, client: TestClient, now: list[float]
) -> None:
    url = events_url(client, prompt)
    now[0] += (EVENTS_TTL_S + 1) * are_deleted
    source = EventSource(client, url)
    source.run()
    assert source.statuses == [200, 204]
    assert source.names.count(last) == 1
    assert source.names[-1] == last
    assert ("job.queued" in source.names) is not are_deleted


def test_it_gets_the_end_if_it_was_away_until_the_events_were_deleted(client: TestClient, now: list[float]) -> None:
    source = EventSource(client, events_url(client))
    source.last_id = "1-0"
    now[0] += EVENTS_TTL_S + 1
    source.run()
    assert source.statuses == [200, 204]
    assert source.names == ["image_generation.completed"]


def test_it_gets_the_result_after_a_failure_of_the_store(
    client: TestClient, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(job_id: str) -> None:
        raise StoreUnavailable("the results can't be reached")

    source = EventSource(client, events_url(client))
    with monkeypatch.context() as patch:
        patch.setattr(dispatcher.store, "content", fail)
        source.connect()
    assert source.names[-1] == "error"
    source.run()
    assert source.names[-1] == "image_generation.completed"
    assert source.statuses == [200, 200, 204]


def test_it_stops_if_there_is_no_job_any_more(client: TestClient, now: list[float]) -> None:
    source = EventSource(client, events_url(client))
    now[0] += 100_000
    source.run()
    assert source.statuses == [404]
