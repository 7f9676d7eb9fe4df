import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from training.scenes.rendering import attribute_targets, object_map, render
from training.scenes.scenes import COLOURS, POSITIONS, SHAPES, SIZES, TEXTURES, TONES, Scene, SceneObject, sample_scene

PURE = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "purple": (0.5, 0, 0.5),
    "cyan": (0, 1, 1),
    "white": (1, 1, 1),
    "black": (0, 0, 0),
}
PLACES = {
    "top left": (32, 32),
    "top right": (32, 96),
    "bottom left": (96, 32),
    "bottom right": (96, 96),
    "centre": (64, 64),
}  # row and column, in an image of 128 pixels
AREA = {  # of a shape of unit radius
    "circle": math.pi * 0.92**2,
    "square": (2 * 0.82) ** 2,
    "triangle": (0.65 + 0.9) * (0.45 + 0.5 * 0.65) / 0.866,
    "cross": 2 * (2 * 0.96) * (2 * 0.3) - (2 * 0.3) ** 2,
    "ring": math.pi * (0.96**2 - 0.48**2),
}


def scene_of(*objects: SceneObject, tone: str = "grey", texture: str = "plain", seed: int = 3) -> Scene:
    yes = (True,) * len(objects)
    return Scene(
        objects,
        tone,
        texture,
        yes,
        yes,
        mentions_background=True,
        relation=None,
        is_terse=False,
        seed=seed,
    )


def coverage(scene: Scene) -> Tensor:
    """The share of each pixel that the scene's one object covers, `(128, 128)`."""
    with_object, background = render([scene, replace(scene, objects=())])
    change: Tensor = (with_object - background).abs().sum(0)
    return change / change.max()


def test_same_seed_gives_the_same_image() -> None:
    scenes = [sample_scene(seed) for seed in range(8)]
    assert torch.equal(render(scenes), render(scenes))


def test_image_does_not_depend_on_its_batch() -> None:
    scenes = [sample_scene(seed) for seed in range(24)]
    together = render(scenes)
    for i, scene in enumerate(scenes):
        torch.testing.assert_close(render([scene])[0], together[i], rtol=0, atol=1e-6)


def test_seed_changes_details_that_the_caption_leaves_open() -> None:
    scene = sample_scene(1)
    first, second = render([scene, replace(scene, seed=2)])
    assert (first - second).abs().mean() > 0.01


def test_images_are_float32_between_minus_one_and_one() -> None:
    images = render([sample_scene(seed, texture="busy") for seed in range(16)])
    assert images.shape == (16, 3, 128, 128)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("colour", COLOURS)
def test_object_has_the_colour_and_place_of_its_caption(colour: str, position: str) -> None:
    scene = scene_of(SceneObject("circle", colour, "small", position))
    row, column = PLACES[position]
    seen = (render([scene])[0, :, row - 4 : row + 4, column - 4 : column + 4].mean((1, 2)) + 1) / 2
    distance = {name: math.dist(seen.tolist(), rgb) for name, rgb in PURE.items()}
    assert min(distance, key=lambda name: distance[name]) == colour


@pytest.mark.parametrize(("size", "radius"), [("small", 0.21), ("large", 0.39)])
@pytest.mark.parametrize("shape", SHAPES)
def test_object_has_the_area_of_its_shape_and_size(shape: str, size: str, radius: float) -> None:
    areas = [
        coverage(scene_of(SceneObject(shape, "black", size, "centre"), tone="light", seed=seed)).sum() / 64**2
        for seed in range(12)
    ]
    for area in areas:  # a scene draws its radius from 0.93 to 1.07 of the middle one
        assert 0.93**2 * 0.97 < area / (AREA[shape] * radius**2) < 1.07**2 * 1.03


def test_edges_are_spread_over_more_than_a_pixel() -> None:
    for shape in SHAPES:
        cover = coverage(scene_of(SceneObject(shape, "white", "large", "centre"), tone="dark"))
        assert max(float(cover.diff(dim=d).abs().max()) for d in (0, 1)) < 0.75
        assert ((cover > 0.1) & (cover < 0.9)).sum() > 100


@pytest.mark.parametrize("tone", TONES)
@pytest.mark.parametrize("texture", TEXTURES)
def test_background_has_the_tone_of_its_caption(tone: str, texture: str) -> None:
    levels = {"light": 0.76, "grey": 0.52, "dark": 0.27}
    images = render([scene_of(tone=tone, texture=texture, seed=seed) for seed in range(8)])
    mean = float((images.mean() + 1) / 2)
    assert min(levels, key=lambda name: abs(levels[name] - mean)) == tone
    assert (images[0].std((1, 2)).max() < 1e-5) == (texture == "plain")


def test_object_map_agrees_with_the_image() -> None:
    scenes = [
        scene_of(*sample_scene(seed, num_objects=1 + seed % 4).objects, tone="grey", seed=seed) for seed in range(24)
    ]
    found = object_map(scenes, 16)
    for scene, slots in zip(scenes, found, strict=True):
        for slot, thing in enumerate(scene.objects):
            painted = replace(thing, colour="red" if thing.colour == "cyan" else "cyan")
            objects = (*scene.objects[:slot], painted, *scene.objects[slot + 1 :])
            recoloured = replace(scene, objects=objects)
            before, after = render([scene, recoloured])
            change = (before - after).abs().sum(0)
            share = torch.nn.functional.avg_pool2d((change / change.max())[None], 8)[0]
            assert (slots[share > 0.35] == slot).all()
            assert (slots[share < 0.05] != slot).all()


def test_attribute_targets_have_the_object_at_each_position() -> None:
    scene = scene_of(
        SceneObject("cross", "cyan", "large", "top right"),
        SceneObject("ring", "red", "small", "bottom left"),
        tone="dark",
        texture="dotted",
    )
    targets = attribute_targets([scene])
    nothing = len(SHAPES)
    assert targets["shape"].tolist() == [[nothing, SHAPES.index("cross"), SHAPES.index("ring"), nothing, nothing]]
    assert targets["colour"].tolist() == [[-100, COLOURS.index("cyan"), COLOURS.index("red"), -100, -100]]
    assert targets["size"].tolist() == [[-100, SIZES.index("large"), SIZES.index("small"), -100, -100]]
    assert targets["tone"].tolist() == [TONES.index("dark")]
    assert targets["texture"].tolist() == [TEXTURES.index("dotted")]
