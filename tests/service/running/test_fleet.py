"""The fleet of a process, with workers that were written down."""

import math
from dataclasses import replace
from typing import Any

import pytest

from models.card import ImageCard, MeshCard, ModelCard
from service.errors import StoreUnavailable
from service.running import fleet as fleets
from service.running.fleet import Fleet
from service.scheduling.fleet import Load, ModelLoad, WorkerRecord, WorkerState

pytestmark = pytest.mark.anyio


class Records:
    """What the fleet reads of a store."""

    def __init__(self) -> None:
        self.records: list[WorkerRecord] = []
        self.is_away = False

    async def workers(self) -> list[WorkerRecord]:
        if self.is_away:
            raise StoreUnavailable("the store is away")
        return list(self.records)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store() -> Records:
    return Records()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def record(name: str, *cards: ModelCard, state: WorkerState = WorkerState.IDLE, **more: Any) -> WorkerRecord:
    return WorkerRecord(name, "1", "cpu", state, {card.id: card for card in cards}, **more)


def fleet_of(store: Any, *, own: WorkerRecord | None = None, models: tuple[str, ...] = (), clock: Any = None) -> Fleet:
    return Fleet(store, lambda: own, models, clock=clock or Clock())


async def test_models_are_the_union_in_a_stable_order(
    store: Records, drawn_card: ImageCard, guided_card: ImageCard, mesh_card: MeshCard
) -> None:
    store.records = [record("b", guided_card, mesh_card), record("a", drawn_card, guided_card)]
    fleet = fleet_of(store)
    assert fleet.cards == {}
    await fleet.refresh()
    assert [*fleet.cards] == ["ball", "drawn", "guided"]
    assert [fleet.num_workers(model) for model in fleet.cards] == [1, 1, 2]
    # The setting `models` comes first, an own worker's models before that.
    wanted = fleet_of(store, models=("guided", "new", "ball"))
    await wanted.refresh()
    assert [*wanted.cards] == ["guided", "ball", "drawn"]
    own = fleet_of(store, own=record("own", drawn_card), models=("guided",))
    assert [*own.cards] == ["drawn"]
    await own.refresh()
    assert [*own.cards] == ["drawn", "guided", "ball"]


async def test_own_worker_is_seen_as_it_is_now_and_once(store: Records, drawn_card: ImageCard) -> None:
    store.records = [record("own", replace(drawn_card, id="earlier")), record("a", drawn_card, pace=3.0)]
    fleet = fleet_of(store, own=record("own", drawn_card, state=WorkerState.BUSY))
    await fleet.refresh()
    assert [(worker.id, worker.state) for worker in fleet.workers] == [("own", "busy"), ("a", "idle")]
    assert [*fleet.cards] == ["drawn"]


async def test_slowest_worker_and_largest_device_make_the_card(store: Records, drawn_card: ImageCard) -> None:
    """Whichever of three devices has the numbers, also if one of them is this process' own."""
    fast = replace(drawn_card, dense_step_seconds=0.1, encode_seconds=0.01, decode_seconds=0.2)
    slow = replace(drawn_card, dense_step_seconds=0.9, encode_seconds=0.05, decode_seconds=0.1)
    small, large = (replace(drawn_card.memory, limit=limit) for limit in (5e9, 90e9))
    cards = [replace(fast, memory=large), replace(slow, memory=small), replace(fast, memory=small)]
    expected = replace(slow, memory=large)
    for first in range(3):
        own, *others = cards[first:] + cards[:first]
        store.records = [record(name, card) for name, card in zip("ab", others, strict=True)]
        fleet = fleet_of(store, own=record("own", own))
        await fleet.refresh()
        assert fleet.card("drawn") == expected


async def test_promises_are_those_of_the_slowest_worker_that_takes_jobs(
    store: Records, drawn_card: ImageCard, guided_card: ImageCard
) -> None:
    store.records = [
        record("a", drawn_card, pace=0.5, finish_s={"drawn": 0.2}),
        record("b", drawn_card, guided_card, pace=2.0, finish_s={"drawn": 0.1}),
        record("c", drawn_card, pace=9.0, finish_s={"drawn": 5.0}, state=WorkerState.DRAINING),
    ]
    fleet = fleet_of(store)
    await fleet.refresh()
    assert (fleet.pace("drawn"), fleet.pace("guided"), fleet.pace("none")) == (2.0, 2.0, 1.0)
    assert (fleet.finish_seconds("drawn"), fleet.finish_seconds("guided")) == (0.2, 0.0)
    load = Load({"drawn": ModelLoad(num_queued=2, queued_s=8.0)})
    assert fleet.seconds_before("drawn", load) == (0.5 * 4 + 2.0 * 4) / 2
    assert math.isinf(fleet.seconds_before("none", load))


async def test_model_whose_last_worker_has_gone_is_known_to_be_absent(
    store: Records, clock: Clock, drawn_card: ImageCard, guided_card: ImageCard
) -> None:
    fleet = fleet_of(store, models=("wanted",), clock=clock)
    store.records = [record("a", drawn_card), record("b", guided_card, state=WorkerState.DRAINING)]
    await fleet.refresh()
    assert ([*fleet.cards], fleet.absent) == (["drawn"], ["wanted"])  # nobody can be asked for "guided" any more
    store.records, clock.now = [], clock.now + 42
    await fleet.refresh()
    assert fleet.absent == ["wanted", "drawn"]
    error = fleet.unavailable("drawn")
    assert "no worker holds the model 'drawn': the last one was seen 42 s ago" in str(error)
    assert (error.model, error.retry_after_s) == ("drawn", fleets.RETRY_AFTER_S)
    assert "'wanted': none has been seen since this server started" in str(fleet.unavailable("wanted"))
    store.records = [record("a", drawn_card)]
    await fleet.refresh()
    assert fleet.absent == ["wanted"]


async def test_workers_are_kept_while_the_store_is_away_for_a_minute(
    store: Records, clock: Clock, drawn_card: ImageCard, guided_card: ImageCard
) -> None:
    store.records = [record("a", drawn_card)]
    fleet = fleet_of(store, own=record("own", guided_card), clock=clock)
    await fleet.refresh()
    store.is_away, clock.now = True, clock.now + fleets.KEPT_S
    with pytest.raises(StoreUnavailable):
        await fleet.refresh()
    assert [*fleet.cards] == ["guided", "drawn"]
    clock.now += 1
    assert [*fleet.cards] == ["guided"]
    assert "the job store has told of none for 61 s" in str(fleet.unavailable("drawn"))


async def test_workers_that_are_calibrated_otherwise_are_warned_of_once(
    store: Records, drawn_card: ImageCard, caplog: pytest.LogCaptureFixture
) -> None:
    store.records = [record("a", drawn_card), record("b", replace(drawn_card, curve=drawn_card.curve[:1]))]
    fleet = fleet_of(store)
    for _ in range(2):
        await fleet.refresh()
    assert caplog.text.count("workers of drawn have different curves") == 1
