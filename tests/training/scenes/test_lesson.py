import pytest
import torch

from training.lesson import Lesson
from training.scenes.captions import captioned_scene
from training.scenes.lesson import SceneLesson
from training.scenes.scenes import COLOURS, SHAPES, SIZES, TEXTURES, TONES

SCENES = [captioned_scene(seed) for seed in range(600)]
FRAGMENT_WORDS = {*COLOURS, *SHAPES, *SIZES, *TEXTURES, *TONES, "a", "objects", "background"}

pytestmark = pytest.mark.parametrize("backbone", ["flux", "qwen_image"], indirect=True)


def test_some_samples_have_an_empty_prompt_and_with_classifier_free_guidance_some_a_fragment(
    lesson: Lesson, request: pytest.FixtureRequest
) -> None:
    assert isinstance(lesson, SceneLesson)
    prompts, is_complete = lesson.prompts(SCENES, torch.Generator().manual_seed(0))
    for prompt, scene, complete in zip(prompts, SCENES, is_complete, strict=True):
        if complete:
            assert all(f"{thing.colour} {thing.shape}" in prompt.lower() for thing in scene.objects)
    others = [prompt for prompt, complete in zip(prompts, is_complete, strict=True) if not complete]
    fragments = [prompt for prompt in others if prompt]
    assert 0.05 < others.count("") / len(SCENES) < 0.15
    if request.node.callspec.params["backbone"] == "flux":
        assert fragments == []
    else:
        assert 0.05 < len(fragments) / len(SCENES) < 0.15
        assert all(set(fragment.split()) <= FRAGMENT_WORDS for fragment in fragments)
        assert len(set(fragments)) > 10


def test_prompts_depend_on_the_generator_alone(lesson: Lesson) -> None:
    assert isinstance(lesson, SceneLesson)
    first, again, other = (lesson.prompts(SCENES[:40], torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_perfect_head_has_no_auxiliary_loss_and_constant_head_has(lesson: Lesson) -> None:
    rows, is_complete = [0, 1, 2, 3], torch.tensor([True, True, False, True])
    output = torch.zeros(4, 64, len(SHAPES) + len(COLOURS) + 2, requires_grad=True)
    blind = lesson.auxiliary_loss(output, rows, is_complete)
    (gradient,) = torch.autograd.grad(blind, output)
    assert not gradient[2].any()
    assert lesson.auxiliary_loss(-1e6 * gradient, rows, is_complete) < 1e-3 < blind
