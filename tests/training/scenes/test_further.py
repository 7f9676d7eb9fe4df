import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from training.scenes.backbones import FluxBackbone
from training.scenes.captions import captioned_scene, complete
from training.scenes.further import Distillation, distil, prompt_pair
from training.scenes.scenes import Scene
from training.scenes.text import FluxConditioner

CHECKPOINT = Path(__file__).parents[3] / "checkpoints" / "tiny-flux"
SEEDS = range(50, 58)

# Under autocast, norms keep their weights in float32.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")


@pytest.fixture
def student() -> tuple[FluxConditioner, FluxBackbone]:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxConditioner.load(CHECKPOINT), FluxBackbone(transformer)


def distillation(student: tuple[FluxConditioner, FluxBackbone]) -> Distillation:
    """A teacher that equals the student."""
    teacher = FluxConditioner.load(CHECKPOINT), FluxBackbone(deepcopy(student[1].transformer))
    latents = torch.randn(len(SEEDS), 64, 32, generator=torch.Generator().manual_seed(1))
    return Distillation(student, teacher, SEEDS, latents)


def caption_without_background(scene: Scene) -> str:
    return replace(complete(scene), mentions_background=False).caption


def test_some_captions_leave_the_background_open_for_student_and_teacher() -> None:
    """Otherwise a negative prompt could not keep the usual background away."""
    rng = random.Random(0)
    conditioner = FluxConditioner.load(CHECKPOINT)
    scenes = [captioned_scene(seed) for seed in range(400)]
    pairs = [prompt_pair(scene, conditioner, True, rng) for scene in scenes]
    prompts = [
        prompt
        for (prompt, known), scene in zip(pairs, scenes, strict=True)
        if known == caption_without_background(scene)
    ]
    assert 80 < len(prompts) < 160
    assert not any("background" in prompt or "Behind" in prompt for prompt in prompts)


@pytest.mark.parametrize("has_fragments", [False, True])
def test_teacher_reads_the_complete_caption_of_the_students_picture(
    student: tuple[FluxConditioner, FluxBackbone], has_fragments: bool
) -> None:
    rng = random.Random(0)
    scenes = [captioned_scene(seed) for seed in range(400)]
    pairs = [prompt_pair(scene, student[0], has_fragments, rng) for scene in scenes]
    whole = [complete(scene).caption for scene in scenes]
    is_open = [known == caption_without_background(scene) for (_, known), scene in zip(pairs, scenes, strict=True)]
    same = [prompt for prompt, known in pairs if prompt == known]
    fragments = [prompt for prompt in same if prompt and prompt not in whole]
    assert all(
        known in (prompt, caption) or leaves_open
        for (prompt, known), caption, leaves_open in zip(pairs, whole, is_open, strict=True)
    )
    assert same.count("") > 10
    assert bool(fragments) == any(is_open) == has_fragments
    assert sum(len(prompt) < len(known) for prompt, known in pairs) > 200


def test_student_that_equals_its_teacher_errs_only_where_its_prompt_is_short(
    student: tuple[FluxConditioner, FluxBackbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = distillation(student).loss(0, batch_size=8)
    monkeypatch.setattr("training.scenes.further.draw_caption", lambda scene, rng, caption: caption(complete(scene)))
    assert distillation(student).loss(0, batch_size=8) < short / 10


def test_encoders_and_transformer_learn_and_the_teacher_does_not(
    student: tuple[FluxConditioner, FluxBackbone], tmp_path: Path
) -> None:
    lesson = distillation(student)
    learning: list[nn.Module] = [student[0].t5, student[0].clip, student[1].transformer]
    fixed: list[nn.Module] = [lesson.teacher[0].encoders["t5"], lesson.teacher[1].transformer]
    before = [deepcopy(module.state_dict()) for module in (*learning, *fixed)]
    distil(lesson, tmp_path, num_steps=2)
    changed = [
        any(not torch.equal(tensor, old[name]) for name, tensor in module.state_dict().items())
        for module, old in zip((*learning, *fixed), before, strict=True)
    ]
    assert changed == [True, True, True, False, False]
