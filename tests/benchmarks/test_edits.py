from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from benchmarks.edits import cases_for, measure, random_mask, rows_of, sheet_of, with_another_object
from models.zoo import load_engine
from training.scenes.prompts import evaluation_scenes

ROOT = Path(__file__).parents[2]


def test_one_object_of_the_scene_gets_another_shape_and_colour() -> None:
    for scene in evaluation_scenes(4, 4):
        changed = with_another_object(scene)
        pairs = [(a, b) for a, b in zip(scene.objects, changed.objects, strict=True) if a != b]
        assert len(pairs) == 1
        (old, new) = pairs[0]
        assert old.shape != new.shape
        assert old.colour != new.colour
        assert (old.position, old.size, scene.seed) == (new.position, new.size, changed.seed)


def test_masks_differ_and_leave_something_to_keep() -> None:
    masks = [random_mask(32, (0.25, 0.7), Random(number)) for number in range(20)]
    assert len({mask.tobytes() for mask in masks}) == 20
    assert all(mask[22, 8] for mask in masks)
    assert all(0.03 < mask.mean() < 0.6 for mask in masks)


def test_every_case_is_compared_with_its_exact_result() -> None:
    engine = load_engine([ROOT / "checkpoints" / "tiny-flux"], device="cpu", router_weights=ROOT / "router_weights")
    cases = cases_for(engine, "tiny-flux", 1)
    assert [case.changes is None for case in cases] == [True, False]
    outcomes = measure(engine, "tiny-flux", cases, quality=0.5)
    for outcome in outcomes:
        assert outcome.summary.num_steps_computed < outcome.case.request.num_steps
        assert 0.5 < outcome.quality < 1
        kept = outcome.case.changes
        assert kept is None or np.array_equal(outcome.elastic[~kept], outcome.case.picture[~kept])
    assert [row["cases"] for row in rows_of(outcomes, 0.5)] == ["1", "1", "1", "1", "1"]
    assert isinstance(sheet_of(outcomes), Image.Image)
