"""One device throughout, and side streams: what can be seen of it without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import nn

import models.device
from models.device import SideStream, find_device, hand_to_steps
from models.errors import DeviceError
from models.families.family import Beginning, BranchStart, Encoded
from models.families.hunyuan3d.checkpoint import load_checkpoint
from models.load_options import LoadOptions, Offload
from models.loading import stream_pipeline
from models.state import BranchInputs, KeptRegion, References
from models.zoo import load_engine


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")


@pytest.mark.usefixtures("two_gpus")
def test_devices_are_found_by_name() -> None:
    assert [str(find_device(name)) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:0", "cuda:1"]
    for name in ("cuda:7", "gpu", "mps", "cuda:-1", ""):
        with pytest.raises(DeviceError) as error:
            find_device(name)
        assert str(error.value) == (f"there is no device '{name}'; there are: cpu, cuda:0 (Card 0), cuda:1 (Card 1)")


def test_a_missing_gpu_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"there is no device 'cuda'; there are: cpu; PyTorch .* finds no GPU"):
        load_engine([tmp_path / "absent"], device="cuda", router_weights=tmp_path)


@pytest.mark.usefixtures("two_gpus")
def test_the_thread_that_loads_uses_the_same_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**30))
    load_engine([], device="cuda:1", router_weights=tmp_path)
    assert used == [torch.device("cuda:1")]


class Recorder:
    """Stands for torch.cuda's streams, and notes what is done with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        recorder = self

        class Stream:
            def __init__(self, device: torch.device) -> None:
                recorder.calls.append(f"new on {device}")

            def synchronize(self) -> None:
                recorder.calls.append("wait")

        @contextmanager
        def stream(stream: Stream) -> Iterator[None]:
            recorder.calls.append("enter")
            yield
            recorder.calls.append("leave")

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", stream)


def test_work_on_a_side_stream_is_over_when_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    side = SideStream(torch.device("cuda:1"))
    with side.used():
        recorder.calls.append("work")
    assert recorder.calls == ["new on cuda:1", "enter", "work", "wait", "leave"]
    # And so it is if the work fails; the stream is the same, since each has memory of its own
    recorder.calls.clear()
    with pytest.raises(RuntimeError), side.used():
        raise RuntimeError
    assert recorder.calls[:2] == ["enter", "wait"]


def test_a_cpu_has_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    with SideStream(torch.device("cpu")).used():
        pass
    assert recorder.calls == []


def test_steps_may_use_all_that_was_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tensors a start has, in every field."""
    handed: list[int] = []
    tensors = [torch.empty(1, number, device="meta") for number in range(9)]
    monkeypatch.setattr(models.device, "_is_on_gpu", lambda tensor: tensor.device.type == "meta")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"steps of {device}")

    def record_stream(tensor: torch.Tensor, stream: str) -> None:
        assert stream == "steps of cuda:1"
        handed.append(tensor.shape[1])

    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    inputs = BranchInputs(tensors[0], tensors[1], tensors[2], References(tensors[3], ((1, 1),)))
    beginning = Beginning(
        (64, 64), tensors[4], torch.zeros(2), torch.zeros(1), KeptRegion(tensors[5], tensors[6], tensors[7])
    )
    encoded = Encoded([BranchStart("cond", inputs, {}), BranchStart("uncond", BranchInputs(tensors[8]), {})], beginning)
    hand_to_steps(encoded, torch.device("cuda:1"))
    assert sorted(handed) == list(range(9))


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_encoders_on_a_cpu_run_in_a_type_that_it_has(
    tiny_flux: Path, tiny_plain_hunyuan3d: Path, has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.device, "cpu_has_bfloat16", lambda: has_bfloat16)
    options = LoadOptions(Offload.TEXT_ENCODERS)
    # The meta device stands for a GPU.
    pipeline: Any = stream_pipeline(FluxPipeline, tiny_flux, "meta", torch.bfloat16, options=options)
    checkpoint = load_checkpoint(
        tiny_plain_hunyuan3d, "meta", torch.bfloat16, options=LoadOptions(Offload.TEXT_ENCODERS)
    )
    expected = torch.bfloat16 if has_bfloat16 else torch.float32

    def types(module: nn.Module) -> set[torch.dtype]:
        return {parameter.dtype for parameter in module.parameters()}

    assert types(pipeline.text_encoder) == types(checkpoint.conditioner) == {expected}
    assert types(pipeline.transformer) == types(checkpoint.denoiser) == {torch.bfloat16}
