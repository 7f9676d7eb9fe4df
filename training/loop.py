"""The loop that every training run shares: a progress bar, checkpoints to resume from, a look at intervals."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """What a checkpoint holds: modules, optimisers, averages."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


def run_loop(
    name: str,
    num_steps: int,
    train_step: Callable[[int], Mapping[str, float]],
    state: Mapping[str, Stateful],
    checkpoint: Path,
    *,
    save_every: int,
    look: Callable[[int], None] | None = None,
    is_main: bool = True,
) -> None:
    """Call `train_step(step)` for every step not done yet; its returned figures are shown, averaged over 50 steps.

    `state` is written to `checkpoint` every `save_every` steps and at the end, and read from there at the start, so an
    interrupted run goes on where it was. `look(step)` is called after each save, to draw samples or measure.
    Of several processes only the one with `is_main` writes.
    """
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        start = saved["step"]
        for key, part in state.items():
            part.load_state_dict(saved[key])
        logger.info("%s: resumed at step %d", name, start)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    smooth: dict[str, float] = {}
    with tqdm(total=num_steps, initial=start, desc=name, mininterval=2, disable=not is_main) as bar:
        for step in range(start, num_steps):
            for key, value in train_step(step).items():
                smooth[key] = value if key not in smooth else smooth[key] + (value - smooth[key]) / 50
            bar.update()
            bar.set_postfix({k: f"{v:.4f}" for k, v in smooth.items()}, refresh=False)
            if (step + 1) % save_every == 0 or step + 1 == num_steps:
                if is_main:
                    _save(checkpoint, step + 1, state)
                if look:
                    look(step + 1)


def _save(path: Path, step: int, state: Mapping[str, Stateful]) -> None:
    partial = path.with_suffix(".partial")
    torch.save({"step": step, **{key: part.state_dict() for key, part in state.items()}}, partial)
    partial.replace(path)


def warm_then_linear(step: int, num_steps: int, *, warm_up: int, hold: float, end: float) -> float:
    """Learning-rate factor: rises over `warm_up` steps, holds until share `hold` of the run, falls evenly to `end`."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step / num_steps - hold) / (1 - hold)
    return 1 - (1 - end) * min(max(progress, 0.0), 1.0)
