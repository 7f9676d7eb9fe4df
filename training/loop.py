"""The loop that every training run shares: progress bar, resumable checkpoints, samples at intervals."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """Anything a checkpoint can hold: a module, an optimiser, a moving average."""

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
    """Call `train_step(step)` for every remaining step and show the figures it returns, averaged over 50 steps.

    `state` is written to `checkpoint` every `save_every` steps and at the end. If `checkpoint` exists, the run resumes
    from it. `look(step)` is called after each save, to draw samples or measure. With several processes, only the one
    with `is_main` writes.
    """
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        start = saved["step"]
        for key, stateful in state.items():
            stateful.load_state_dict(saved[key])
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
    torch.save({"step": step, **{key: stateful.state_dict() for key, stateful in state.items()}}, partial)
    partial.replace(path)
