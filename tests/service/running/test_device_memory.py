"""A worker with little memory, in which the CPU is planned like a GPU: real models, and what they should take."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient

from models.card import ImageCard
from models.curve import Preset
from models.engine import Engine
from models.memory import RequestMemory
from models.request import GenerationRequest, PresetBudget
from models.state import DenoiseState
from models.zoo import load_engine
from service.app import build_dispatcher, create_app
from service.jobs.job import Job
from service.jobs.store import Claim, Fit, JobKind
from service.scheduling.memory import usual_request
from service.settings import Settings
from tests.fixtures.waiting import wait_until

MODEL = Path(__file__).parents[3] / "checkpoints/tiny-flux"
EXACT = PresetBudget(Preset.EXACT)


class Watched:
    """Notes how many requests shared each step, and how many were encoded. Steps wait while `gate` is not set."""

    def __init__(self, engine: Engine) -> None:
        self.batches: list[int] = []
        self.num_encoded = 0
        self.gate = Event()
        self.gate.set()
        self._step, engine.step = engine.step, self.step  # type: ignore[method-assign]
        self._encode, engine.encode = engine.encode, self.encode  # type: ignore[method-assign]

    def encode(self, request: GenerationRequest, branches: Any = None) -> Any:
        encoded = self._encode(request, branches)
        self.num_encoded += 1
        return encoded

    def step(self, states: Sequence[DenoiseState]) -> Any:
        self.gate.wait()
        self.batches.append(len(states))
        return self._step(states)


def memory_for_two(router_weights: Path) -> int:
    """The memory that is enough for two of the model's requests."""
    (card,) = load_engine([MODEL], device="cpu", router_weights=router_weights).cards.values()
    memory = card.memory_of(usual_request(card, EXACT))
    peak = max(2 * memory.step + memory.apart + memory.call, memory.decode) + memory.start
    return math.ceil((card.memory.weights + 2 * memory.running + peak) * 8 / 7)


@pytest.fixture(scope="module")
def small_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Watched]]:
    router_weights = tmp_path_factory.mktemp("routers")
    settings = Settings(
        models=(MODEL,),
        router_weights=router_weights,
        device_memory=memory_for_two(router_weights),  # type: ignore[arg-type]
    )
    watched: list[Watched] = []

    def load() -> Engine:
        engine = load_engine(
            settings.model_directories, device="cpu", router_weights=router_weights, options=settings.load_options
        )
        # As measured on a busy machine, sharing a step may save nothing.
        engine.cards = {model: replace(card, fixed_share=0.5) for model, card in engine.cards.items()}
        watched.append(Watched(engine))
        return engine

    dispatcher = build_dispatcher(settings, load)
    dispatcher.worker.start()
    with TestClient(create_app(settings, dispatcher)) as client:
        yield client, watched[0]


def post(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/images", json={"prompt": "a red circle", "num_inference_steps": 3, **fields})


def test_requests_step_in_pairs_where_memory_is_enough_for_two(small_device: tuple[TestClient, Watched]) -> None:
    client, watched = small_device
    watched.gate.clear()
    with ThreadPoolExecutor(8) as threads:
        # A deadline lets them share steps, which exact ones do not.
        answers = threads.map(lambda seed: post(client, seed=seed, budget={"latency_ms": 600_000}), range(8))
        wait_until(lambda: watched.num_encoded == 2)  # so the second one can join the first one's next step
        watched.gate.set()
    assert [answer.status_code for answer in answers] == [200] * 8
    assert max(watched.batches) == 2
    assert sum(watched.batches) == 8 * 3


def test_what_never_fits_is_refused_and_the_size_in_the_message_works(small_device: tuple[TestClient, Watched]) -> None:
    client, _ = small_device
    refused = post(client, size="256x256")
    assert refused.status_code == 422, refused.text
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == ("size", "invalid_parameter")
    size = error["message"].rpartition(" ")[2]
    assert post(client, size=size).status_code == 200


def test_memory_is_shown(small_device: tuple[TestClient, Watched]) -> None:
    client, _ = small_device
    memory = client.get("/v1/models/tiny-flux").json()["memory"]
    assert memory["requests_at_once"] == 2
    assert memory["default_request"] == memory["exact_request"] <= memory["room"]
    assert memory["weights"] + memory["room"] < memory["limit"]

    def read() -> dict[str, float]:
        metrics = client.get("/metrics").text
        kinds = re.findall(r'elastic_gpu_memory_bytes{kind="(\w+)"} (\S+)', metrics)
        return {kind: float(value) for kind, value in kinds}

    with ThreadPoolExecutor(1) as thread:
        thread.submit(post, client, num_inference_steps=100)
        wait_until(lambda: read()["running"] > 0)
        shown = read()
    assert shown.keys() == {"limit", "reserve", "weights", "running"}
    assert (shown["limit"], shown["weights"]) == (memory["limit"], memory["weights"])
    planned = shown["limit"] - shown["reserve"] - shown["weights"]
    assert shown["running"] <= memory["room"] == pytest.approx(planned, abs=1)
    wait_until(lambda: read()["running"] == 0)


def test_worker_leaves_jobs_that_are_too_large_and_lets_none_overtake_one_that_waits(
    engine: Any, make_job: Callable[..., Job], drawn_card: ImageCard, settings: Settings
) -> None:
    # Given a device with room for a job, and little more
    job = make_job("a")
    room = drawn_card.memory_of(job.requests[0]).alone + 1000
    memory = replace(drawn_card.memory, limit=math.ceil(room * 8 / 7), all_weights=0)
    engine.cards = {"drawn": replace(drawn_card, memory=memory)}
    worker = build_dispatcher(settings, lambda: cast(Engine, engine)).worker
    worker.start()
    fits = worker.fits()
    assert not worker.record("w", is_leaving=False).urgent_waits
    # Then what never fits is passed over
    assert fits(JobKind("drawn", "drawn 64x64", False, RequestMemory(running=room + 2))) is Fit.NO
    assert fits(JobKind.of(job)) is Fit.NOW
    # And what has to wait for room holds up those behind it
    engine.gate.clear()
    worker.take(Claim(job, "lease"))
    assert fits(JobKind("drawn", "drawn 128x64", False, RequestMemory(running=room))) is Fit.WAITS
    assert fits(JobKind("drawn", "drawn 64x64", False, RequestMemory(running=10))) is Fit.NOW
    assert worker.record("w", is_leaving=False).urgent_waits
    worker.drop("a")
    engine.gate.set()
    assert worker.stop(20)
