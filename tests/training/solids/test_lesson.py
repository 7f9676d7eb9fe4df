from pathlib import Path

import pytest
import torch

from training.lesson import Lesson
from training.solids.lesson import SolidLesson, read_lesson
from training.solids.sampling import training_solids
from training.solids.symmetry import turn_images

pytestmark = pytest.mark.parametrize("backbone", ["hunyuan3d"], indirect=True)


def test_noise_tokens_are_assigned_to_near_tokens_and_keep_their_values(lesson: Lesson) -> None:
    clean = lesson.latents[:8]
    noise = lesson.noise(clean, torch.Generator().manual_seed(1))
    drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    for moved, original in zip(noise, drawn, strict=True):
        assert (torch.cdist(moved, original, compute_mode="donot_use_mm_for_euclid_dist") == 0).sum() == len(original)
    assert (noise - clean).square().sum((1, 2)).lt((drawn - clean).square().sum((1, 2))).all()


def test_a_tenth_of_the_samples_have_no_image(lesson: Lesson) -> None:
    rows = [*range(40)] * 20
    tokens, is_complete = lesson.conditions(rows, torch.Generator().manual_seed(1))
    assert 0.05 < (~is_complete).float().mean() < 0.15
    assert not tokens.embeds[~is_complete].any()
    assert torch.equal(tokens.embeds[is_complete], lesson.full_conditions(rows).embeds[is_complete])


def test_image_of_a_sample_is_turned_by_the_symmetry_of_its_encoding(lesson: Lesson) -> None:
    assert isinstance(lesson, SolidLesson)
    image = turn_images(lesson._images[3:4], lesson._symmetries[19:20]) / 127.5 - 1
    expected = lesson.conditioner(image)
    # Training encodes images in 16 bits.
    torch.testing.assert_close(lesson.full_conditions([19]).embeds, expected, rtol=0, atol=0.05)


def test_single_primitives_keep_one_encoding_and_other_solids_keep_all(
    lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given three encodings of eight solids
    assert isinstance(lesson, SolidLesson)
    monkeypatch.setattr("training.solids.lesson.NUM_SOLIDS", 8)
    monkeypatch.setattr("training.solids.images.CHUNK", 8)
    torch.save(torch.arange(24.0)[:, None], tmp_path / "latents.pt")
    torch.save(torch.arange(24) % 8, tmp_path / "ways.pt")
    # When they are read
    read = read_lesson(tmp_path, lesson.conditioner)
    # Then only the first encoding of each single primitive is kept
    is_single = [solid.operation is None for solid in training_solids(0, 8)]
    assert 0 < sum(is_single) < 8
    kept = [row for row in range(24) if row < 8 or not is_single[row % 8]]
    assert read.latents[:, 0].tolist() == kept
    assert read._symmetries.tolist() == [row % 8 for row in kept]
    assert read._solids.tolist() == [row % 8 for row in kept]
