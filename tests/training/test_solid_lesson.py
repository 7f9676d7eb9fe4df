from typing import Any

import pytest
import torch
from torch import nn

from training.lesson import Lesson
from training.picture_encoder import turn_pictures
from training.solid_lesson import SolidLesson

pytestmark = pytest.mark.parametrize("backbone", ["hunyuan3d"], indirect=True)


def test_noise_is_given_to_the_nearest_tokens_and_stays_the_same_noise(lesson: Lesson) -> None:
    clean = lesson.latents[:8]
    noise = lesson.noise(clean, torch.Generator().manual_seed(1))
    drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    for given, original in zip(noise, drawn, strict=True):
        assert (torch.cdist(given, original, compute_mode="donot_use_mm_for_euclid_dist") == 0).sum() == len(original)
    assert (noise - clean).square().sum((1, 2)).lt((drawn - clean).square().sum((1, 2))).all()


def test_a_tenth_of_the_samples_see_no_picture(lesson: Lesson) -> None:
    rows = [*range(40)] * 20
    tokens, told = lesson.conditions(rows, torch.Generator().manual_seed(1))
    assert 0.05 < (~told).float().mean() < 0.15
    assert not tokens.embeds[~told].any()
    assert torch.equal(tokens.embeds[told], lesson.full_conditions(rows).embeds[told])


def test_every_sample_sees_its_solid_turned_as_it_was_encoded(lesson: Lesson) -> None:
    assert isinstance(lesson, SolidLesson)
    picture = turn_pictures(lesson._pictures[3:4], lesson._ways[19:20]) / 127.5 - 1
    assert torch.equal(lesson.full_conditions([19]).embeds, lesson._conditioner(picture))


def test_the_conditioner_learns_with_the_denoiser_unless_it_is_frozen(backbone: Any, lesson: Lesson) -> None:
    assert isinstance(lesson, SolidLesson)
    assert lesson.encoder is None
    learning = SolidLesson(lesson.latents, lesson._ways, lesson._pictures, lesson._conditioner, is_frozen=False)
    assert isinstance(learning.encoder, nn.Module)
    learning.conditions([1, 2, 3], torch.Generator().manual_seed(0))[0].embeds.sum().backward()
    gradients = {name: parameter.grad is not None for name, parameter in learning.encoder.named_parameters()}
    assert [name for name, is_there in gradients.items() if not is_there] == [
        "main_image_encoder.model.embeddings.mask_token"
    ]
