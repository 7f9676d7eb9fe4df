"""The published objective for routers, to compare ours with: one budget, not a range, and no dense model to match.

It is that of the official program (Elastic-DiT at ce39f1d, `diffsynth/diffusion/loss.py`; arXiv 2602.13993): the
flow-matching error, and the squared distances of two means over each sample's blocks from targets, all three with
weight 1. The mean probability to run is compared with a target that falls linearly with the noise; the mean expected
width of the blocks that run, with a fixed target. Both are of probabilities, where `training.routers` counts hard
decisions.

What stays different: the backbone is frozen, where the official Qwen-Image checkpoint has a fine-tuned one. No targets
are published; these let blocks run with a mean probability of .55, for about half of the compute.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from models.rules.router import PAPER
from training.precision import autocast
from training.routers import Knobs, RouterObjective, elastic_forward

TARGET_GATES = (0.7, 0.4)
"""The mean probability to run without noise, and in noise alone."""
TARGET_WIDTH = 0.8


class PublishedObjective(RouterObjective):
    """The losses `flow`, `gate` and `width` of one training step. All its steps have the policy PAPER's threshold."""

    WEIGHTS: ClassVar[Mapping[str, float]] = {"flow": 1.0, "gate": 1.0, "width": 1.0}

    def knobs(self, rng: torch.Generator) -> Knobs:
        """The one budget."""
        return Knobs(PAPER.skip_threshold, 0.0)

    def losses(self, rows: list[int], rng: torch.Generator, knobs: Knobs) -> dict[str, Tensor]:
        """The losses of samples `rows` of the lesson; see the module."""
        if self._is_paired:
            rows = rows[: len(rows) // 2] * 2
        batch = self._noisy_batch(rows, rng)
        batch = replace(batch, guidance=torch.ones_like(batch.guidance))  # so the right answers are in the data
        with torch.no_grad():
            streams = self._prologue(rows, batch)
        with autocast():
            velocity, decided = elastic_forward(self.backbone, self.routers, streams, knobs)
        clean, noisy = TARGET_GATES
        target_gates = clean + (noisy - clean) * batch.timestep
        is_open = decided.gates.detach()
        widths = (decided.expected_widths * is_open).sum(0) / is_open.sum(0).clamp(min=1)
        return {
            "flow": F.mse_loss(velocity.float(), batch.velocity),
            "gate": (decided.depths.mean(0) - target_gates).square().mean(),
            "width": (widths - TARGET_WIDTH).square().mean(),
        }
