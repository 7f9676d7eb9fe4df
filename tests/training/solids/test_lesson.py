from pathlib import Path

import pytest
import torch

from training.lesson import Lesson
from training.solids.image_encoder import turn_pictures
from training.solids.lesson import SolidLesson, read_lesson
from training.solids.solids import training_solids

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
    expected = lesson.conditioner(picture)
    # Training reads pictures in 16 bits.
    torch.testing.assert_close(lesson.full_conditions([19]).embeds, expected, rtol=0, atol=0.05)


def test_single_primitives_occur_once_and_the_others_in_every_way(
    lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given encodings of eight solids in three ways
    assert isinstance(lesson, SolidLesson)
    monkeypatch.setattr("training.solids.lesson.NUM_SOLIDS", 8)
    monkeypatch.setattr("training.solids.images.CHUNK", 8)
    torch.save(torch.arange(24.0)[:, None], tmp_path / "latents.pt")
    torch.save(torch.arange(24) % 8, tmp_path / "ways.pt")
    # When they are read
    of_solids = read_lesson(tmp_path, lesson.conditioner)
    # Then samples of single primitives are left out but for the first of each
    is_single = [solid.operation is None for solid in training_solids(0, 8)]
    assert 0 < sum(is_single) < 8
    kept = [row for row in range(24) if row < 8 or not is_single[row % 8]]
    assert of_solids.latents[:, 0].tolist() == kept
    assert of_solids._ways.tolist() == [row % 8 for row in kept]
    assert of_solids._solids.tolist() == [row % 8 for row in kept]
