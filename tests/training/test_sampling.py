import torch
from torch import nn

from training.backbone import Backbone
from training.lesson import Lesson
from training.sampling import sample


def test_samples_are_guided_away_from_no_condition(backbone: Backbone, lesson: Lesson) -> None:
    for module in backbone.transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    full, none = lesson.full_conditions([0, 1]), lesson.no_condition
    at = {scale: sample(backbone, full, none, (64, 32), guidance_scale=scale, num_steps=1) for scale in (0.0, 1.0, 3.0)}
    torch.testing.assert_close(at[3.0] - at[0.0], 3 * (at[1.0] - at[0.0]), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(at[1.0], at[0.0], atol=1e-4)
