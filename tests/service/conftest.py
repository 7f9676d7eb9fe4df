"""A small engine with the real engine's contract, and the service around it.

`DrawnEngine` draws a image from its seed with numpy, so that the service is tested without torch. Prompts steer it:
"refuse" fails to start as the client's fault, "break at start", "break at step" and "break at finish" fail as ours.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import fmean
from threading import Event, Thread
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import pytest
import trimesh
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from models.budget import resolve
from models.card import DecodeSpeed, Guidance, ImageCard, MeshCard, ModelCard, SizeLimits
from models.curve import EXACT, ComputedSteps, CurvePoint, Preset
from models.errors import EmptySurface, InvalidRequest
from models.file_formats import MeshFormat
from models.memory import ImageMemory, MeshMemory, Values
from models.mesh.cleanup import CleanMesh, clean
from models.mesh.surface import FieldSamples, Mesh
from models.report import BlockReport, Decision, GenerationSummary, StepDecision, StepReport, TokenCounts
from models.request import ImageRequest, LatencyBudget, MeshRequest, QualityBudget
from models.rules.dense import DensePolicy
from models.rules.router import RouterPolicy
from service.app import build_dispatcher, create_app
from service.jobs.job import FinishedJob, Job, JobSnapshot, JobStatus, Priority
from service.jobs.store import ended
from service.order import Output
from service.running.dispatcher import Dispatcher
from service.running.held import HeldJob
from service.settings import Settings

if TYPE_CHECKING:
    from models.engine import Engine

T = TypeVar("T")

CURVE = (
    EXACT,
    CurvePoint(RouterPolicy(skip_threshold=0.2), 0.8, 0.82, 0.97, 0.98, Preset.HIGH),
    CurvePoint(RouterPolicy(skip_threshold=0.4), 0.6, 0.64, 0.9, 0.93, Preset.BALANCED),
    CurvePoint(RouterPolicy(skip_threshold=0.5), 0.5, 0.55, 0.8, 0.85, Preset.FAST),
    CurvePoint(RouterPolicy(skip_threshold=0.7), 0.4, 0.46, 0.6, 0.7, Preset.DRAFT),
)

DRAWN_MEMORY = ImageMemory(
    weights=1_000_000,
    num_blocks=2,
    token_bytes=128,
    latent_bytes=64,
    step_values=(Values(10.0, 10.0),),
    pixels_per_token=16,
    max_text_tokens=16,
    pads_prompts=True,
    encode_token_bytes=1000,
    encode_pixel_bytes=10,
    decode_pixel_bytes=20,
)

DRAWN_CARD = ImageCard(
    id="drawn",
    family="drawn",
    license="apache-2.0",
    created=1_700_000_000,
    default_height=64,
    default_width=64,
    decode_seconds=0.0,
    default_num_inference_steps=4,
    default_guidance_scale=3.5,
    sizes=SizeLimits(multiple_of=16, minimum=32, maximum=1024),
    max_prompt_characters=200,
    max_num_inference_steps=50,
    guidance=Guidance.DISTILLED,
    rules=("dense", "router"),
    quality_metric="ssim",
    curve=CURVE,
    blocks=("double.00", "single.00"),
    dense_step_seconds=0.5,
    fixed_share=0.2,
    encode_seconds=0.0,
    max_batch_size=4,
    memory=DRAWN_MEMORY,
)

# As DRAWN_CARD, of a family whose guidance is true.
GUIDED_CARD = replace(DRAWN_CARD, id="guided", guidance=Guidance.TRUE)

# As DRAWN_CARD, of a model whose budgets forecast steps.
FORECASTING_CARD = replace(
    DRAWN_CARD,
    id="forecasting",
    default_num_inference_steps=8,
    rules=("forecast", "dense"),
    curve=(
        EXACT,
        CurvePoint(DensePolicy(), 0.5, 0.5, 0.9, 0.95, Preset.BALANCED, ComputedSteps(4, 8)),
        CurvePoint(DensePolicy(), 0.25, 0.25, 0.6, 0.7, Preset.DRAFT, ComputedSteps(2, 8)),
    ),
    edit_steps=tuple(tuple(max(1, taken * computed // 8) for computed in range(1, 9)) for taken in range(1, 9)),
)

MESH_MEMORY = MeshMemory(
    weights=1_000_000,
    num_blocks=1,
    token_bytes=128,
    latent_bytes=64,
    step_values=(Values(10.0, 10.0),),
    num_latents=64,
    num_text_tokens=1,
    encode_bytes=1000,
    context_bytes=1000,
    field_bytes=10_000,
    field_peak_bytes=20_000,
    points_per_call=2048,
    point_bytes=100,
)

MESH_CARD = MeshCard(
    id="ball",
    family="drawn",
    license="apache-2.0",
    created=1_700_000_000,
    default_num_inference_steps=4,
    default_guidance_scale=3.5,
    max_num_inference_steps=50,
    guidance=Guidance.TRUE,
    rules=("dense", "router"),
    quality_metric="volume_iou",
    curve=CURVE,
    blocks=("block.00",),
    dense_step_seconds=0.5,
    fixed_share=0.2,
    encode_seconds=0.0,
    max_batch_size=4,
    memory=MESH_MEMORY,
    default_octree_resolution=32,
    min_octree_resolution=16,
    max_octree_resolution=64,
    octree_resolution_step=8,
    decode_speed=DecodeSpeed(field_point=0.0, grid_point=0.0, face=0.0),
)


@dataclass(slots=True)
class DrawnState:
    request: ImageRequest | MeshRequest
    step_index: int = 0
    computed: list[int] = field(default_factory=list)
    moves: list[CurvePoint] = field(default_factory=list)

    @property
    def point(self) -> CurvePoint:
        return self.moves[-1] if self.moves else self.request.point

    def move_to(self, point: CurvePoint) -> None:
        self.moves.append(point)

    @property
    def batch_key(self) -> Hashable:
        match self.request:
            case ImageRequest(model=model, height=height, width=width):
                return model, height, width
            case _:
                return self.request.model

    @property
    def expected_runs(self) -> list[float]:
        return [self.point.compute_ratio / self.point.computed_share] * len(DRAWN_CARD.blocks)

    @property
    def num_steps(self) -> int:
        """A mesh's schedule ends in a step of no length, as Hunyuan3D's does."""
        return self.request.num_steps - isinstance(self.request, MeshRequest)

    @property
    def num_computed_steps(self) -> int:
        wanted = self.point.num_computed_steps(self.num_steps, self.request.compute_cap)
        to_compute = max(wanted - len(self.computed), 1)
        return len(self.computed) + min(to_compute, self.num_steps - self.step_index)

    def compute_step(self) -> int:
        """Compute the next step, go on to the one after it, and return the number of forecast steps between."""
        to_compute = self.num_computed_steps - len(self.computed)
        self.computed.append(self.step_index)
        num_forecast = (self.num_steps - self.step_index) // to_compute - 1
        self.step_index += 1 + num_forecast
        return num_forecast

    @property
    def is_done(self) -> bool:
        return self.step_index == self.num_steps

    @property
    def compute_ratio(self) -> float:
        return self.point.compute_ratio

    def summary(self) -> GenerationSummary:
        point = self.point
        num_forecast = self.step_index - len(self.computed)
        decisions = tuple(
            StepDecision(step, "cond", block, Decision.RUN, 1.0)
            if step in self.computed
            else StepDecision(step, "cond", block, Decision.FORECAST, 0.0)
            for step in range(self.step_index)
            for block in DRAWN_CARD.blocks
        )
        return GenerationSummary(
            rule=point.rule,
            skip_threshold_first=point.policy.skip_threshold,
            skip_threshold_last=point.policy.skip_threshold,
            quality_applied=fmean(move.quality for move in self.moves) if self.moves else point.quality,
            compute_ratio=point.compute_ratio,
            compute_ratio_predicted=point.compute_ratio,
            num_run=2 * len(self.computed),
            num_skipped=0,
            num_reused=0,
            num_forecast=2 * num_forecast,
            mean_mlp_width=1.0,
            num_inference_steps=self.request.num_inference_steps,
            num_steps_computed=len(self.computed),
            num_steps_forecast=num_forecast,
            is_calibrated=point.is_calibrated,
            decisions=decisions if self.request.wants_trace else None,
            tokens=_tokens(self.request),
            exact_tolerance=0.0 if self.request.wants_exact else None,
        )


class DrawnEngine:
    """`gate` holds steps back while it is cleared, `decoding_gate` what comes after them. A batch saves no time.

    `encoding_gate` holds back encoding, which has begun once `encoding` is set. `encoded` has the seeds that were
    encoded, and whether with the branches of another request. Prompts with "known" in them are in the cache.

    With `has_fields` meshes are decoded in turns, without end until `field_gate` is set; `fields` has the seeds
    of those that have begun, `dropped_fields` of those that were given up; `is_decoding` is set once one has begun.
    `batches` has the seeds of every step's batch, `moves` the places on the curve of steps under a deadline. Meshes are
    balls; of seed 666 there is no surface.
    """

    def __init__(self) -> None:
        self.cards: dict[str, ModelCard] = {"drawn": DRAWN_CARD, "guided": GUIDED_CARD, "ball": MESH_CARD}
        self.decoding_gate = Event()
        self.decoding_gate.set()
        self.gate = Event()
        self.gate.set()
        self.stepping = Event()
        self.encoding_gate = Event()
        self.encoding_gate.set()
        self.encoding = Event()
        self.encoded: list[tuple[int, bool]] = []
        self.batches: list[list[int]] = []
        self.started: list[int] = []
        self.moves: list[CurvePoint] = []
        self.has_fields = False
        self.field_gate = Event()
        self.is_decoding = Event()
        self.fields: list[int] = []
        self.dropped_fields: list[int] = []

    def add(self, card: ModelCard) -> None:
        self.cards = {**self.cards, card.id: card}

    def remove(self, model: str) -> None:
        self.cards = {name: card for name, card in self.cards.items() if name != model}

    def preparation(self, request: ImageRequest | MeshRequest) -> Callable[[], Any] | None:
        return None

    def encodes_on_device(self, model: str) -> bool:
        return True

    def encode(self, request: ImageRequest | MeshRequest, branches: Any = None) -> SimpleNamespace:
        self.encoded.append((request.seed, branches is not None))
        self.encoding.set()
        assert self.encoding_gate.wait(timeout=20)
        if "refuse" in _prompt(request):
            raise InvalidRequest("the prompt has 900 tokens; try 512", "prompt")
        if "break at start" in _prompt(request):
            raise RuntimeError("secret detail")
        return SimpleNamespace(branches=branches or [SimpleNamespace(was_cached="known" in _prompt(request))])

    def start(self, request: ImageRequest | MeshRequest, *, encoded: SimpleNamespace) -> DrawnState:
        self.started.append(request.seed)
        return DrawnState(request, moves=self.moves if isinstance(request.budget, LatencyBudget) else [])

    def step(self, states: Sequence[DrawnState]) -> StepReport:
        self.stepping.set()
        assert self.gate.wait(timeout=20)
        assert len({state.batch_key for state in states}) == 1
        assert not any(state.is_done for state in states)
        self.batches.append([state.request.seed for state in states])
        if any("break at step" in _prompt(state.request) for state in states):
            raise RuntimeError("secret detail")
        num_forecast = sum(state.compute_step() for state in states)
        widths = (1.0,) * len(states)
        blocks = tuple(BlockReport(block, 0.001, len(states), 0, 0, widths) for block in DRAWN_CARD.blocks)
        seconds = 0.002 * sum(state.compute_ratio for state in states)
        return StepReport(seconds, 0.0001, len(states), blocks, num_forecast, num_forecast)

    def memory_bytes(self) -> dict[str, int]:
        return {}

    def preview(self, state: DrawnState) -> Callable[[], NDArray[np.uint8] | CleanMesh]:
        step = state.step_index
        if isinstance(state.request, MeshRequest):
            return lambda: _ball(1, None)
        return lambda: np.full((8, 8, 3), step, dtype=np.uint8)

    def decode_in_turns(self, state: DrawnState) -> Generator[None, None, FieldSamples] | None:
        assert state.is_done
        return self._field(state) if self.has_fields and isinstance(state.request, MeshRequest) else None

    def _field(self, state: DrawnState) -> Generator[None, None, FieldSamples]:
        self.fields.append(state.request.seed)
        self.is_decoding.set()
        try:
            while not self.field_gate.is_set():
                yield
        except GeneratorExit:
            self.dropped_fields.append(state.request.seed)
            raise
        if state.request.seed == 666:
            raise EmptySurface("no surface: the field is not finite at 3 points")
        side = np.linspace(-1, 1, 9, dtype=np.float32)
        ball = 0.8 - np.sqrt(side[:, None, None] ** 2 + side[:, None] ** 2 + side**2)
        return FieldSamples(9, np.arange(ball.size, dtype=np.int32), ball.ravel())

    def finish(self, state: DrawnState) -> NDArray[np.uint8] | CleanMesh:
        assert state.is_done
        assert self.decoding_gate.wait(timeout=20)
        request = state.request
        if isinstance(request, MeshRequest):
            if request.seed == 666:
                raise EmptySurface("no surface: the field lies in [-2, -1] and never crosses 0")
            return _ball(3, request.target_faces)
        if "break at finish" in request.prompt:
            raise RuntimeError("secret detail")
        shape = (request.height, request.width, 4 if request.is_transparent else 3)
        return np.random.default_rng(request.seed).integers(0, 256, shape, dtype=np.uint8)


def _ball(subdivisions: int, target_faces: int | None) -> CleanMesh:
    ball = trimesh.creation.icosphere(subdivisions=subdivisions)
    return clean(Mesh(ball.vertices.astype(np.float32), ball.faces.astype(np.int32)), target_faces)


def _tokens(request: ImageRequest | MeshRequest) -> TokenCounts:
    """A token for each word of the prompt, and for each square of 16 pixels."""
    if isinstance(request, MeshRequest):
        return TokenCounts(latents=64)
    words = f"{request.prompt} {request.negative_prompt or ''}".split()
    return TokenCounts(len(words), 0, request.height * request.width // 256)


def _prompt(request: ImageRequest | MeshRequest) -> str:
    return request.prompt if isinstance(request, ImageRequest) else ""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def drawn_card() -> ImageCard:
    return DRAWN_CARD


@pytest.fixture
def mesh_card() -> MeshCard:
    return MESH_CARD


@pytest.fixture
def guided_card() -> ImageCard:
    return GUIDED_CARD


@pytest.fixture
def engine() -> DrawnEngine:
    return DrawnEngine()


@pytest.fixture
def forecasting_card(engine: DrawnEngine) -> ImageCard:
    """The card of a model whose budgets forecast steps. The engine has loaded it."""
    engine.cards[FORECASTING_CARD.id] = FORECASTING_CARD
    return FORECASTING_CARD


@pytest.fixture
def settings() -> Settings:
    return Settings(
        max_body_bytes=20_000,
        max_mesh_body_bytes=200_000,
        max_edit_body_bytes=200_000,
        max_image_pixels=1_000_000,
        grace_s=20,
    )


class Service:
    """A dispatcher with its worker, in a thread with an event loop of its own."""

    def __init__(self, settings: Settings, engine: DrawnEngine) -> None:
        self.dispatcher = build_dispatcher(settings, lambda: cast("Engine", engine))
        self.store = self.dispatcher.store
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.dispatcher.worker.start()
        self._running = self.dispatcher.running()
        self.run(self._running.__aenter__())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop, and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def submit(self, job: Job) -> "Future[FinishedJob]":
        """Queue a job; the future is done when it has ended."""
        self.run(self.store.add(job))
        return asyncio.run_coroutine_threadsafe(self._finished(job.id), self._loop)

    async def _finished(self, job_id: str) -> FinishedJob:
        snapshot = await ended(self.store, job_id)
        if snapshot.state.status is JobStatus.SUCCEEDED:
            return await self.store.content(job_id)
        return FinishedJob(snapshot.job, snapshot.state, ())

    def get(self, job_id: str) -> JobSnapshot:
        return self.run(self.store.get(job_id))

    def wait_until_taken(self, *job_ids: str, are_encoded: bool = True) -> None:
        """Wait until the worker holds these jobs, and has encoded them."""
        deadline = time.monotonic() + 60

        def is_taken(held: HeldJob | None) -> bool:
            if held is None or not are_encoded:
                return held is not None
            return all(index in held.encoding and held.encoding[index].done() for index in [*held.unstarted])

        while not all(is_taken(self.dispatcher.worker._held.get(job_id)) for job_id in job_ids):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def cancel(self, job_id: str) -> JobSnapshot:
        return self.run(self.dispatcher.cancel(job_id))

    def drain_soon(self) -> None:
        async def begin() -> None:
            self.dispatcher.in_background(self.dispatcher.drain())

        self.run(begin())

    def drain(self) -> None:
        self.run(self.dispatcher.drain())

    def close(self) -> None:
        self.run(self._running.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def start_service(engine: DrawnEngine) -> Iterator[Callable[[Settings], Service]]:
    """Start a service with these settings; it is stopped after the test."""
    services = []

    def start(settings: Settings) -> Service:
        services.append(Service(settings, engine))
        return services[-1]

    yield start
    engine.gate.set()
    engine.decoding_gate.set()
    for service in services:
        service.close()


@pytest.fixture
def service(start_service: Callable[[Settings], Service], settings: Settings) -> Service:
    return start_service(settings)


@pytest.fixture
def make_dispatcher(engine: DrawnEngine) -> Callable[[Settings], Dispatcher]:
    """A dispatcher whose worker has been started, for the test to run in an event loop."""

    def make(settings: Settings) -> Dispatcher:
        dispatcher = build_dispatcher(settings, lambda: cast("Engine", engine))
        dispatcher.worker.start()
        return dispatcher

    return make


@pytest.fixture
def start_client(
    engine: DrawnEngine, make_dispatcher: Callable[[Settings], Dispatcher]
) -> Iterator[Callable[..., TestClient]]:
    """A client of an application with these settings around a started worker; both end after the test."""
    with ExitStack() as stack:

        def start(settings: Settings, **options: Any) -> TestClient:
            app = create_app(settings, make_dispatcher(settings))
            client = TestClient(app, raise_server_exceptions=False, **options)
            return stack.enter_context(client)

        yield start
        engine.gate.set()
        engine.decoding_gate.set()


@pytest.fixture
def client(start_client: Callable[..., TestClient], settings: Settings) -> TestClient:
    return start_client(settings)


@pytest.fixture
def make_request() -> Callable[..., ImageRequest]:
    def make(*, card: ImageCard = DRAWN_CARD, **fields: Any) -> ImageRequest:
        defaults: dict[str, Any] = {
            "model": card.id,
            "prompt": "a red circle",
            "height": 64,
            "width": 64,
            "num_inference_steps": card.default_num_inference_steps,
            "guidance_scale": 3.5,
            "seed": 0,
            "budget": QualityBudget(0.9),
        }
        asked = {**defaults, **fields}
        is_guided = card.is_guided(asked["guidance_scale"], asked.get("true_cfg_scale", 1.0))
        request = ImageRequest(**{"point": EXACT, "is_guided": is_guided, **asked})
        return replace(request, point=resolve(request.budget, card.curve_for(request)))

    return make


@pytest.fixture
def summary(make_request: Callable[..., ImageRequest]) -> GenerationSummary:
    """The summary of a result with quality 0.8, which took half of the dense compute."""
    return DrawnState(make_request(budget=QualityBudget(0.8))).summary()


@pytest.fixture
def make_job(make_request: Callable[..., ImageRequest]) -> Callable[..., Job]:
    """A job of one image, or of as many as there are `seeds`; other fields are its requests'."""

    def make(job_id: str, *, seeds: Sequence[int] = (0,), priority: Priority = Priority.NORMAL, **fields: Any) -> Job:
        requests = tuple(make_request(seed=seed, **fields) for seed in seeds)
        return Job(
            id=job_id,
            model=requests[0].model,
            requests=requests,
            output=Output(),
            priority=priority,
            quality_requested=0.9,
            predicted_seconds=2.0,
            request_id="test",
            created_at=0.0,
        )

    return make


@pytest.fixture
def make_mesh_job(make_job: Callable[..., Job]) -> Callable[..., Job]:
    """A job of one mesh; other fields are its request's."""

    def make(job_id: str, **fields: Any) -> Job:
        defaults: dict[str, Any] = {
            "model": MESH_CARD.id,
            "num_inference_steps": MESH_CARD.default_num_inference_steps,
            "guidance_scale": MESH_CARD.default_guidance_scale,
            "seed": 0,
            "budget": QualityBudget(1.0),
            "point": EXACT,
            "is_guided": True,
            "input_image": b"png",
            "octree_resolution": MESH_CARD.default_octree_resolution,
        }
        request = MeshRequest(**{**defaults, **fields})
        return replace(make_job(job_id), model=request.model, requests=(request,), output=Output(MeshFormat.GLB))

    return make
