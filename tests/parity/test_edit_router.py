"""`edit_router`: our router with the official weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.elastic.router import Router
from models.families.qwen_image.conversion import router_tensors
from models.weights import router_stack
from training.routers import hard_gate


@pytest.fixture(scope="module")
def recording(recorded: Callable[[str], Any]) -> Any:
    return recorded("edit_router")


@pytest.fixture(scope="module")
def router(recording: Any) -> Router:
    return router_stack(router_tensors(recording.weights)).routers[0]


def test_router_scores_as_recorded(recording: Any, router: Router) -> None:
    cases = [case for case in recording.settings["cases"] if f"in/{case}/image" in recording.tensors]
    assert cases
    for case in cases:
        text, image, temb = (recording.tensors[f"in/{case}/{name}"] for name in ("text", "image", "temb"))
        # Each row has its own time embedding, because rows of a batch may be at different steps.
        modulation = router.modulation(temb.expand(len(image), -1))
        means: list[Tensor] = []
        handle = router.gate_head.register_forward_pre_hook(lambda _, args, means=means: means.append(args[0]))
        scores = router((text, image), modulation, (None, None))
        handle.remove()
        expected = {name: recording.tensors[f"out/{case}/{name}"] for name in ("trunk", "gate_logit", "width_logits")}
        near: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}
        torch.testing.assert_close(means[0], expected["trunk"].mean(1), **near)
        torch.testing.assert_close(scores.depth_logits, expected["gate_logit"][:, 0], **near)
        torch.testing.assert_close(scores.width_logits, expected["width_logits"], **near)
        probs = recording.tensors[f"out/{case}/prob"][:, 0]
        torch.testing.assert_close(scores.depth_logits.sigmoid(), probs, atol=1e-5, rtol=0)
        assert torch.equal(scores.width_logits.argmax(1), recording.tensors[f"out/{case}/width_idx"])


def test_training_gate_has_the_recorded_values_and_gradients(recording: Any) -> None:
    cotangent, logit = (recording.tensors[f"in/train/{name}"] for name in ("gate_cotangent", "gate_logit"))
    expected, prob = recording.tensors["out/train/gate"][:, 0], recording.tensors["out/train/prob"][:, 0]
    logit = logit.clone().requires_grad_()
    gate = hard_gate(logit[:, 0], 0.5)
    (gate * cotangent[:, 0]).sum().backward()
    assert logit.grad is not None
    torch.testing.assert_close(logit.grad, recording.tensors["out/train/gate_logit_grad"])
    # Exactly at the threshold, the official program skips in training and runs in inference; ours runs in both.
    expected = torch.where(prob == 0.5, 1.0, expected)
    torch.testing.assert_close(gate.detach(), expected)
