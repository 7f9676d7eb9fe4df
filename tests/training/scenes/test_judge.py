import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.errors import WeightsError
from training.scenes.accuracy import PromptAccuracy, Reading, score_readings
from training.scenes.judge import SHIPPED_JUDGE, Judge, load_judge, save_judge
from training.scenes.prompts import evaluation_scenes
from training.scenes.rendering import render
from training.scenes.scenes import Scene, SceneObject

CIRCLE = SceneObject("circle", "red", "large", "top left")
RING = SceneObject("ring", "blue", "small", "bottom right")
CROSS = SceneObject("cross", "yellow", "small", "bottom left")


def scene_of(
    *objects: SceneObject, mentions_positions: bool = True, relation: str | None = None, seed: int = 3
) -> Scene:
    return Scene(
        objects=objects,
        tone="dark",
        texture="plain",
        mentions_sizes=(True,) * len(objects),
        mentions_positions=(mentions_positions,) * len(objects),
        mentions_background=True,
        relation=relation,
        is_terse=False,
        seed=seed,
    )


def score_of(scene: Scene, found: Sequence[SceneObject], tone: str = "dark", texture: str = "plain") -> PromptAccuracy:
    return score_readings([scene], [Reading(tuple(found), tone, texture)])


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge(SHIPPED_JUDGE)


def test_rendered_held_out_scenes_are_read_correctly(judge: Judge) -> None:
    scenes = evaluation_scenes(96, 96)
    accuracy = judge.score(scenes, render(scenes))
    assert accuracy.per_object >= 0.98
    assert accuracy.per_scene >= 0.98
    assert set(accuracy.by_attribute) == {"shape", "colour", "size", "count", "tone", "texture", "background"}
    assert min(accuracy.by_attribute.values()) >= 0.98


def test_reading_does_not_depend_on_the_batch(judge: Judge) -> None:
    images = render(evaluation_scenes(8, 8))
    assert judge.read(images) == [judge.read(image[None])[0] for image in images]


@pytest.mark.parametrize(
    ("drawn", "objects_right"),
    [
        ((CIRCLE, RING), 1.0),
        ((replace(CIRCLE, colour="green"), RING), 0.5),
        ((replace(CIRCLE, shape="square"), RING), 0.5),
        ((replace(CIRCLE, size="small"), RING), 0.5),
        ((replace(CIRCLE, position="bottom left"), RING), 0.5),
        ((replace(CIRCLE, colour="blue"), replace(RING, colour="red")), 0.0),
        ((CIRCLE,), 0.5),
        ((), 0.0),
    ],
)
def test_image_of_another_scene_is_judged_wrong(
    judge: Judge, drawn: tuple[SceneObject, ...], objects_right: float
) -> None:
    asked = scene_of(CIRCLE, RING)
    mentioned = (True,) * len(drawn)
    images = render([replace(asked, objects=drawn, mentions_sizes=mentioned, mentions_positions=mentioned)])
    accuracy = judge.score([asked], images)
    assert accuracy.per_object == objects_right
    assert accuracy.per_scene == float(objects_right == 1)
    assert accuracy.by_attribute["background"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_extra_object_makes_the_scene_wrong_but_not_its_objects(judge: Judge, seed: int) -> None:
    asked = scene_of(CIRCLE, RING, seed=seed)
    accuracy = judge.score([asked], render([scene_of(CIRCLE, RING, CROSS, seed=seed)]))
    assert accuracy.per_object == 1
    assert accuracy.per_scene == 0
    assert accuracy.by_attribute["count"] == 0


def test_noise_is_not_a_scene(judge: Judge) -> None:
    scenes = evaluation_scenes(16, 16)
    noise = torch.randn(32, 3, 128, 128, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert judge.score(scenes, noise).per_scene == 0


def test_images_of_another_size_are_refused(judge: Judge) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\)"):
        judge.read(torch.zeros(1, 3, 64, 64))


def test_size_and_background_outside_the_caption_are_not_judged() -> None:
    asked = replace(scene_of(CIRCLE), mentions_sizes=(False,), mentions_background=False)
    accuracy = score_of(asked, [replace(CIRCLE, size="small")], tone="light", texture="busy")
    assert accuracy == PromptAccuracy(1.0, 1.0, {"shape": 1.0, "colour": 1.0, "count": 1.0})


def test_wrong_background_does_not_make_the_scene_wrong() -> None:
    accuracy = score_of(scene_of(CIRCLE), [CIRCLE], tone="light")
    assert accuracy.per_scene == 1
    assert accuracy.by_attribute["texture"] == 1
    assert accuracy.by_attribute["tone"] == accuracy.by_attribute["background"] == 0


def test_object_without_a_captioned_position_may_be_anywhere() -> None:
    asked = scene_of(CIRCLE, RING, mentions_positions=False)
    assert score_of(asked, [replace(RING, position="centre"), replace(CIRCLE, position="top right")]).per_scene == 1


def test_one_found_object_does_not_count_twice() -> None:
    asked = scene_of(CIRCLE, replace(CIRCLE, position="top right"), mentions_positions=False)
    accuracy = score_of(asked, [CIRCLE])
    assert (accuracy.per_object, accuracy.per_scene) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("relation", "first", "second", "holds"),
    [
        ("left of", "top left", "top right", True),
        ("left of", "bottom left", "centre", True),
        ("left of", "top left", "bottom left", False),
        ("left of", "top right", "top left", False),
        ("right of", "bottom right", "bottom left", True),
        ("right of", "top left", "top right", False),
        ("above", "top right", "bottom left", True),
        ("above", "bottom left", "top left", False),
        ("below", "bottom right", "top right", True),
        ("below", "top left", "top right", False),
    ],
)
def test_relation_must_hold_between_the_found_objects(relation: str, first: str, second: str, holds: bool) -> None:
    asked = scene_of(CIRCLE, RING, mentions_positions=False, relation=relation)
    accuracy = score_of(asked, [replace(CIRCLE, position=first), replace(RING, position=second)])
    assert accuracy.per_scene == float(holds)
    assert accuracy.per_object == (1.0 if holds else 0.5)


def test_relation_between_wrong_objects_counts_for_nothing() -> None:
    asked = scene_of(CIRCLE, RING, mentions_positions=False, relation="left of")
    wrong = [SceneObject("cross", "red", "large", "top left"), SceneObject("square", "blue", "small", "top right")]
    accuracy = score_of(asked, wrong)
    assert (accuracy.per_object, accuracy.per_scene) == (0.0, 0.0)
    assert accuracy.by_attribute["colour"] == 1


def test_shares_are_taken_over_all_objects_of_all_scenes() -> None:
    scenes = [scene_of(CIRCLE), scene_of(CIRCLE, RING, CROSS)]
    readings = [Reading((), "dark", "plain"), Reading((CIRCLE, RING, CROSS), "dark", "busy")]
    accuracy = score_readings(scenes, readings)
    assert (accuracy.per_object, accuracy.per_scene) == (0.75, 0.5)
    assert accuracy.by_attribute["background"] == 0.5


def test_weights_survive_a_round_trip(tmp_path: Path, judge: Judge) -> None:
    save_judge(judge, tmp_path, num_test_scenes=2)
    loaded = load_judge(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in judge.state_dict().items())


def test_weights_that_do_not_match_their_manifest_are_refused(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED_JUDGE, tmp_path / "judge")
    manifest = json.loads((tmp_path / "judge" / "manifest.json").read_text())
    (tmp_path / "judge" / "manifest.json").write_text(json.dumps(manifest | {"sha256": "0" * 64}))
    with pytest.raises(WeightsError, match="its manifest says 0000"):
        load_judge(tmp_path / "judge")


def test_shipped_judge_is_small_and_states_its_accuracy() -> None:
    manifest = json.loads((SHIPPED_JUDGE / "manifest.json").read_text())
    assert manifest["license"] == "Apache-2.0"
    assert manifest["accuracy"]["per_object"] >= 0.98
    assert (SHIPPED_JUDGE / "model.safetensors").stat().st_size <= 1_000_000


@pytest.mark.slow
def test_loading_a_judge_needs_no_training_stack() -> None:
    heavy = "{'diffusers', 'transformers', 'tokenizers', 'skimage', 'PIL'}"
    code = f"import sys, training.scenes.judge; print(*{heavy} & {{*sys.modules}})"
    folder = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
