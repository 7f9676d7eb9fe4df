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
from training.scenes.judge import Judge, PromptAccuracy, Reading, load_judge, save_judge, score_readings
from training.scenes.prompts import evaluation_scenes
from training.scenes.rendering import render
from training.scenes.scenes import Scene, SceneObject

FOLDER = Path(__file__).parents[3] / "checkpoints" / "judge"

CIRCLE = SceneObject("circle", "red", "large", "top left")
RING = SceneObject("ring", "blue", "small", "bottom right")
CROSS = SceneObject("cross", "yellow", "small", "bottom left")


def scene_of(*objects: SceneObject, places_told: bool = True, relation: str | None = None, seed: int = 3) -> Scene:
    return Scene(
        objects=objects,
        tone="dark",
        texture="plain",
        told_sizes=(True,) * len(objects),
        told_positions=(places_told,) * len(objects),
        tells_background=True,
        relation=relation,
        is_terse=False,
        seed=seed,
    )


def score_of(scene: Scene, found: Sequence[SceneObject], tone: str = "dark", texture: str = "plain") -> PromptAccuracy:
    return score_readings([scene], [Reading(tuple(found), tone, texture)])


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge(FOLDER)


def test_held_out_true_scenes_are_read_right(judge: Judge) -> None:
    scenes = evaluation_scenes(96, 96)
    accuracy = judge.score(scenes, render(scenes))
    assert accuracy.per_object >= 0.98
    assert accuracy.per_scene >= 0.98
    assert set(accuracy.by_attribute) == {"shape", "colour", "size", "count", "tone", "texture", "background"}
    assert min(accuracy.by_attribute.values()) >= 0.98


def test_reading_does_not_depend_on_the_batch(judge: Judge) -> None:
    pictures = render(evaluation_scenes(8, 8))
    assert judge.read(pictures) == [judge.read(picture[None])[0] for picture in pictures]


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
def test_picture_of_something_else_is_judged_wrong(
    judge: Judge, drawn: tuple[SceneObject, ...], objects_right: float
) -> None:
    asked = scene_of(CIRCLE, RING)
    told = (True,) * len(drawn)
    pictures = render([replace(asked, objects=drawn, told_sizes=told, told_positions=told)])
    accuracy = judge.score([asked], pictures)
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


def test_pictures_of_another_size_are_refused(judge: Judge) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\)"):
        judge.read(torch.zeros(1, 3, 64, 64))


def test_untold_size_and_background_are_not_judged() -> None:
    asked = replace(scene_of(CIRCLE), told_sizes=(False,), tells_background=False)
    accuracy = score_of(asked, [replace(CIRCLE, size="small")], tone="light", texture="busy")
    assert accuracy == PromptAccuracy(1.0, 1.0, {"shape": 1.0, "colour": 1.0, "count": 1.0})


def test_wrong_background_does_not_make_the_scene_wrong() -> None:
    accuracy = score_of(scene_of(CIRCLE), [CIRCLE], tone="light")
    assert accuracy.per_scene == 1
    assert accuracy.by_attribute["texture"] == 1
    assert accuracy.by_attribute["tone"] == accuracy.by_attribute["background"] == 0


def test_object_whose_place_is_not_told_may_stand_anywhere() -> None:
    asked = scene_of(CIRCLE, RING, places_told=False)
    assert score_of(asked, [replace(RING, position="centre"), replace(CIRCLE, position="top right")]).per_scene == 1


def test_one_found_object_does_not_count_twice() -> None:
    asked = scene_of(CIRCLE, replace(CIRCLE, position="top right"), places_told=False)
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
    asked = scene_of(CIRCLE, RING, places_told=False, relation=relation)
    accuracy = score_of(asked, [replace(CIRCLE, position=first), replace(RING, position=second)])
    assert accuracy.per_scene == float(holds)
    assert accuracy.per_object == (1.0 if holds else 0.5)


def test_relation_between_wrong_objects_counts_for_nothing() -> None:
    asked = scene_of(CIRCLE, RING, places_told=False, relation="left of")
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
    shutil.copytree(FOLDER, tmp_path / "judge")
    manifest = json.loads((tmp_path / "judge" / "manifest.json").read_text())
    (tmp_path / "judge" / "manifest.json").write_text(json.dumps(manifest | {"sha256": "0" * 64}))
    with pytest.raises(WeightsError, match="its manifest says 0000"):
        load_judge(tmp_path / "judge")


def test_shipped_judge_is_small_and_says_how_good_it_is() -> None:
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    assert manifest["license"] == "Apache-2.0"
    assert manifest["accuracy"]["per_object"] >= 0.98
    assert (FOLDER / "model.safetensors").stat().st_size <= 1_000_000


def test_loading_a_judge_needs_no_training_stack() -> None:
    heavy = "{'diffusers', 'transformers', 'tokenizers', 'skimage', 'PIL'}"
    code = f"import sys, training.scenes.judge; print(*{heavy} & {{*sys.modules}})"
    folder = FOLDER.parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
