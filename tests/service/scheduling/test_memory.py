import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.card import ImageCard, MeshCard
from models.curve import EXACT, CurvePoint, Preset
from models.errors import InvalidRequest
from models.memory import RequestMemory
from models.request import ImageRequest, LatencyBudget, MeshRequest, PresetBudget
from models.rules.router import RouterPolicy
from service.scheduling.memory import (
    Decoding,
    DeviceMemory,
    InMemory,
    check_fits,
    largest_image,
    num_at_once,
    step_bytes,
    usual_request,
)

ROOM = 1000
MAX_BATCH_SIZE = 4


@st.composite
def _memories(draw: st.DrawFn) -> RequestMemory:
    """Of a request that fits alone."""
    running = draw(st.integers(1, 400))
    grid = draw(st.sampled_from([0, 0, 100]))
    peak = st.integers(0, ROOM - running - grid)
    step = draw(peak)
    return RequestMemory(
        start=draw(peak),
        running=running,
        step=step,
        apart=draw(st.integers(0, ROOM - running - grid - step)),
        finished=draw(st.integers(0, running)),
        decode=draw(peak),
        preview=draw(st.integers(0, 2 * ROOM)),
        grid=grid,
    )


class Worker:
    """What a worker does with what fits: the planned peak is checked at each step of the way."""

    def __init__(self) -> None:
        self.running: list[InMemory] = []
        self.published: list[tuple[InMemory, str]] = []
        self.previews: list[tuple[int, str]] = []

    @property
    def device(self) -> DeviceMemory:
        peaks: dict[str, int] = {}
        for entry, model in self.published:
            peaks[model] = max(peaks.get(model, 0), entry.memory.decode)
        for peak, model in self.previews:
            peaks[model] = max(peaks.get(model, 0), peak)
        held = sum(entry.memory.finished for entry, _ in self.published)
        return DeviceMemory(ROOM, 150, self.running, Decoding(held, peaks))

    def check(self, peak: int = 0) -> None:
        """That what is held, all decodings and `peak` of the worker's thread are inside."""
        assert self.device.held + self.device.decoding.peak + peak <= ROOM

    def start(self, new: InMemory, max_batch_size: int) -> bool:
        if not self.device.can_start(new, max_batch_size):
            return False
        assert self.device.held + new.memory.running + new.memory.start + self.device.decoding.peak <= ROOM
        self.running.append(new)
        self.check()
        return True

    def step(self, shape: str) -> None:
        batch = [entry for entry in self.running if entry.shape == shape and not entry.is_done][:MAX_BATCH_SIZE]
        if not batch:
            return
        count = self.device.num_that_fit([entry.memory for entry in batch])
        # Nothing waits but for a decoding
        assert count or self.device.decoding.peak
        if count:
            self.check(step_bytes([entry.memory for entry in batch[:count]]))

    def end(self, index: int) -> None:
        entry = self.running[index]
        self.running[index] = replace(entry, is_done=True)
        self.check()

    def decode(self, model: str) -> None:
        done = next((entry for entry in self.running if entry.is_done), None)
        if done is None:
            return
        can = self.device.can_decode(model, done.memory.decode)
        assert can or self.device.decoding.peak
        if can:
            self.running.remove(done)
            self.published.append((done, model))
            self.check()

    def preview(self, entry: InMemory, model: str) -> None:
        if self.device.can_preview(model, entry.memory.preview):
            self.previews.append((entry.memory.preview, model))
            self.check()


@given(st.data())
def test_planned_peak_never_exceeds_the_room_and_nothing_waits_for_ever(data: st.DataObject) -> None:
    worker = Worker()
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["start", "start", "step", "end", "decode", "preview", "decoded"]))
        model = data.draw(st.sampled_from("ab"))
        if action == "start":
            new = InMemory(data.draw(st.sampled_from("xy")), data.draw(_memories()))
            started = worker.start(new, data.draw(st.sampled_from([1, MAX_BATCH_SIZE])))
            assert started or worker.running or worker.published
        elif action == "step":
            worker.step(data.draw(st.sampled_from("xy")))
        elif action == "end" and worker.running:
            worker.end(data.draw(st.integers(0, len(worker.running) - 1)))
        elif action == "decode":
            worker.decode(model)
        elif action == "preview" and worker.running:
            worker.preview(worker.running[0], model)
        elif action == "decoded":
            worker.published, worker.previews = worker.published[1:], worker.previews[1:]
            worker.check()


def test_a_batch_is_cut_to_what_fits_beside_a_decoding() -> None:
    member = RequestMemory(running=100, step=150, decode=300)
    device = DeviceMemory(1000, 0, [InMemory("x", member)] * 4)
    assert device.num_that_fit([member] * 4) == 4
    assert replace(device, decoding=Decoding(0, {"a": 300})).num_that_fit([member] * 4) == 2
    assert replace(device, decoding=Decoding(0, {"a": 500})).num_that_fit([member] * 4) == 0


def test_a_thread_decodes_one_result_at_a_time() -> None:
    decoding = Decoding(0, {"a": 300, "b": 100})
    assert (decoding.peak, decoding.peak_with("a", 200), decoding.peak_with("b", 200)) == (400, 400, 500)


@pytest.fixture
def limited_card(drawn_card: ImageCard) -> ImageCard:
    """With room for a request of 512x512 pixels at the most."""
    card = replace(drawn_card, default_height=512, default_width=512)
    needed = card.memory_of(usual_request(card, PresetBudget(Preset.EXACT))).alone
    limit = math.ceil((needed + card.memory.weights) * 8 / 7)
    return replace(card, memory=replace(card.memory, limit=limit, all_weights=card.memory.weights))


def test_what_never_fits_is_refused_with_the_size_that_would(limited_card: ImageCard) -> None:
    fitting = usual_request(limited_card, PresetBudget(Preset.EXACT))
    assert isinstance(fitting, ImageRequest)
    check_fits(fitting, limited_card)
    with pytest.raises(InvalidRequest, match="the largest that fits is 512x512") as caught:
        check_fits(replace(fitting, width=1024, height=1024), limited_card)
    assert caught.value.param == "size"
    assert "size 1024x1024 needs" in str(caught.value)
    with pytest.raises(InvalidRequest, match="the largest that fits is 720x352"):
        check_fits(replace(fitting, width=1024, height=512), limited_card)
    assert largest_image(fitting, limited_card) == (512, 512)


def test_what_fits_at_no_size_is_refused_as_well(limited_card: ImageCard) -> None:
    request = usual_request(limited_card, PresetBudget(Preset.EXACT))
    full = replace(limited_card, memory=replace(limited_card.memory, all_weights=int(limited_card.memory.limit)))
    with pytest.raises(InvalidRequest, match="no smaller one fits"):
        check_fits(request, full)
    assert num_at_once(request, full) == 0


def test_the_grid_of_a_mesh_decides_its_resolution(mesh_card: MeshCard) -> None:
    usual = usual_request(mesh_card, PresetBudget(Preset.EXACT))
    assert isinstance(usual, MeshRequest)
    limit = math.ceil((mesh_card.memory_of(usual).alone + 1000) * 8 / 7)
    card = replace(mesh_card, memory=replace(mesh_card.memory, limit=limit, all_weights=0))
    with pytest.raises(InvalidRequest, match=r"octree_resolution 64 needs .* the largest that fits is 32") as caught:
        check_fits(replace(usual, octree_resolution=64), card)
    assert caught.value.param == "octree_resolution"


def test_fewer_requests_fit_that_reuse_blocks(limited_card: ImageCard) -> None:
    reusing = CurvePoint(RouterPolicy(reuse_band=0.1, max_reuses=2), 0.5, 0.5, 0.8, 0.9, Preset.FAST)
    memory = replace(limited_card.memory, limit=4 * limited_card.memory.limit, num_blocks=20)
    card = replace(limited_card, memory=memory, curve=(EXACT, reusing))
    exact, fast = (
        num_at_once(usual_request(card, PresetBudget(preset)), card) for preset in (Preset.EXACT, Preset.FAST)
    )
    assert exact > fast >= 1


def test_only_budgets_that_may_reach_a_policy_with_reuse_pay_for_it(drawn_card: ImageCard) -> None:
    reusing = CurvePoint(RouterPolicy(reuse_band=0.1, max_reuses=2), 0.5, 0.5, 0.8, 0.9)
    skipping = CurvePoint(RouterPolicy(skip_threshold=0.3), 0.7, 0.7, 0.9, 0.9)
    card = replace(drawn_card, curve=(EXACT, skipping, reusing))
    request = usual_request(card, PresetBudget(Preset.EXACT))
    exact, skips = card.memory_of(request), card.memory_of(replace(request, point=skipping))
    assert skips.running == exact.running
    reuses = card.memory_of(replace(request, point=reusing))
    assert reuses.running - exact.running == 2 * (16 + 16) * card.memory.token_bytes  # two blocks, image and text
    # A deadline may lead to any point of the curve
    assert card.memory_of(replace(request, budget=LatencyBudget(1.0))).running == reuses.running
