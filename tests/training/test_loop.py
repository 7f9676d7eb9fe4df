from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from training.loop import run_loop


class Interrupted(Exception):
    pass


def run_line_fit(
    checkpoint: Path, num_steps: int = 12, *, stop_at: int | None = None, save_every: int = 4
) -> nn.Linear:
    """Fit a small line; the data of a step depend on the step alone."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)

    def train_step(step: int) -> dict[str, float]:
        if step == stop_at:
            raise Interrupted
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = (model(inputs)[:, 0] - inputs.sum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    run_loop("line", num_steps, train_step, {"model": model, "optimizer": optimizer}, checkpoint, save_every=save_every)
    return model


@pytest.mark.parametrize("stop_at", [2, 4, 7, 11])
def test_interrupted_run_resumes_to_the_result_of_an_uninterrupted_one(tmp_path: Path, stop_at: int) -> None:
    whole = run_line_fit(tmp_path / "whole.pt")
    with pytest.raises(Interrupted):
        run_line_fit(tmp_path / "broken.pt", stop_at=stop_at)
    resumed = run_line_fit(tmp_path / "broken.pt")
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)


def test_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    whole = run_line_fit(tmp_path / "line.pt")
    again = run_line_fit(tmp_path / "line.pt", stop_at=0)
    assert torch.equal(whole.weight, again.weight)


@pytest.fixture
def recorder() -> tuple[list[int], Callable[[int], dict[str, float]]]:
    steps: list[int] = []

    def train_step(step: int) -> dict[str, float]:
        steps.append(step)
        return {}

    return steps, train_step


def test_look_follows_each_save_and_the_last_step(
    tmp_path: Path, recorder: tuple[list[int], Callable[[int], dict[str, float]]]
) -> None:
    steps, train_step = recorder
    looks: list[int] = []
    run_loop("looks", 10, train_step, {}, tmp_path / "looks.pt", save_every=4, look=looks.append)
    assert steps == list(range(10))
    assert looks == [4, 8, 10]


def test_only_the_main_process_writes(
    tmp_path: Path, recorder: tuple[list[int], Callable[[int], dict[str, float]]]
) -> None:
    run_loop("other", 2, recorder[1], {}, tmp_path / "other.pt", save_every=1, is_main=False)
    assert not (tmp_path / "other.pt").exists()
