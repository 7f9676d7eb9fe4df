from typing import Any

import pytest
import torch

from models.elastic.host import to_device, to_host


def test_numbers_of_the_host_stay_as_they_are() -> None:
    numbers = torch.tensor([[1.5, 2.0], [3.0, -4.0]], dtype=torch.bfloat16)
    assert to_host(numbers) == [[1.5, 2.0], [3.0, -4.0]]
    assert to_host(to_device(numbers, torch.device("cpu"))) == [[1.5, 2.0], [3.0, -4.0]]


class OnDevice:
    """A tensor of another device, whose copy is complete only once its event has been waited for."""

    is_cuda, device = True, torch.device("cuda:1")

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def to(self, device: str, *, non_blocking: bool) -> "OnDevice":
        assert (device, non_blocking) == ("cpu", True)
        self.calls.append("copy")
        return self

    def tolist(self) -> list[float]:
        self.calls.append("read")
        return [1.0]


def test_numbers_of_a_device_are_read_after_their_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Event:
        def record(self, stream: str) -> None:
            calls.append(("record", stream))

        def synchronize(self) -> None:
            calls.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    numbers: Any = OnDevice(calls)
    assert to_host(numbers) == [1.0]
    assert calls == ["copy", ("record", "stream of cuda:1"), "wait", "read"]
