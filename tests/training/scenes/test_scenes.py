import random
from dataclasses import replace

import pytest

from training.scenes.prompts import (
    calibration_scenes,
    complex_scenes,
    evaluation_scenes,
    related_scenes,
    simple_scenes,
    sparse_scenes,
)
from training.scenes.scenes import (
    COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    TONES,
    Scene,
    SceneObject,
    sample_scene,
    training_scene,
    training_scenes,
)

CIRCLE = SceneObject("circle", "red", "large", "top left")
RING = SceneObject("ring", "blue", "small", "top right")
PAIR = Scene(
    objects=(CIRCLE, RING),
    tone="light",
    texture="striped",
    mentions_sizes=(True, False),
    mentions_positions=(True, True),
    mentions_background=True,
    relation=None,
    is_terse=False,
    seed=0,
)


def test_same_seed_gives_the_same_scene() -> None:
    assert list(training_scenes(40, 20)) == [training_scene(seed) for seed in range(40, 60)]
    assert training_scene(40) == training_scene(40) != training_scene(50)


def test_ten_training_scenes_have_every_number_of_objects() -> None:
    counts = [len(scene.objects) for scene in training_scenes(70, 10)]
    assert [counts.count(number) for number in (1, 2, 3, 4)] == [3, 3, 2, 2]


def test_held_out_combinations_never_occur_in_training_scenes() -> None:
    assert not any(thing.is_held_out for scene in training_scenes(0, 3000) for thing in scene.objects)


def test_held_out_scenes_have_only_held_out_combinations() -> None:
    scenes = [sample_scene(seed, held_out=True) for seed in range(500)]
    assert all(thing.is_held_out for scene in scenes for thing in scene.objects)


def test_training_scenes_have_every_shape_in_every_colour() -> None:
    shown = {(thing.shape, thing.colour) for scene in training_scenes(0, 2000) for thing in scene.objects}
    assert shown == {(shape, colour) for shape in SHAPES for colour in COLOURS}


def test_objects_of_a_scene_have_different_positions() -> None:
    for scene in training_scenes(0, 2000):
        places = {thing.position for thing in scene.objects}
        assert len(places) == len(scene.objects)
        assert places <= set(POSITIONS)


def test_caption_mentions_the_attributes_it_should() -> None:
    assert (
        PAIR.caption
        == "a large red circle at the top left, a blue ring at the top right, on a striped light background"
    )


def test_terse_caption_has_no_articles_or_prepositions() -> None:
    terse = replace(PAIR, is_terse=True, mentions_background=False, mentions_positions=(False, True))
    assert terse.caption == "large red circle, blue ring top right"


def test_caption_of_a_relation_names_no_position() -> None:
    related = replace(PAIR, relation="left of", mentions_positions=(False, False), mentions_background=False)
    assert related.caption == "a large red circle left of a blue ring"


@pytest.mark.parametrize("form", ["caption", "long_caption"])
def test_complete_captions_distinguish_scenes(form: str) -> None:
    captions: dict[str, object] = {}
    for seed in range(500):
        scene = sample_scene(seed, mentions_all=True)
        content = (frozenset(scene.objects), scene.tone, scene.texture)
        assert captions.setdefault(getattr(scene, form), content) == content


def test_long_caption_mentions_these_attributes_in_whole_sentences() -> None:
    first, second, end = PAIR.long_caption.split(".")
    assert first.endswith(" a large red circle at the top left and a blue ring at the top right")
    assert "striped" in second
    assert "light" in second
    assert end == ""


def test_long_caption_of_a_relation_names_no_position() -> None:
    related = replace(PAIR, relation="left of", mentions_positions=(False, False), mentions_background=False)
    assert related.long_caption.endswith(" a large red circle left of a blue ring.")
    assert related.long_caption.count(".") == 1


def test_long_caption_lists_objects_with_one_and() -> None:
    three = replace(
        PAIR,
        objects=(CIRCLE, RING, SceneObject("cross", "black", "small", "bottom left")),
        mentions_sizes=(True, True, True),
        mentions_positions=(False, False, False),
        mentions_background=False,
    )
    assert three.long_caption.endswith(" a large red circle, a small blue ring and a small black cross.")


def test_long_caption_has_the_facts_of_the_short_one() -> None:
    """The facts have the order of the short caption, and there are no others."""
    telling = {*COLOURS, *SHAPES, *SIZES, *TEXTURES, *TONES, *" ".join(POSITIONS + RELATIONS).split()} - {"of"}

    def facts(text: str) -> list[str]:
        return [word for word in text.replace(",", "").replace(".", "").split() if word in telling]

    for scene in training_scenes(0, 500):
        assert facts(scene.long_caption) == facts(scene.caption)


def test_long_captions_have_several_wordings_and_each_scene_always_one() -> None:
    openings = {replace(PAIR, seed=seed).long_caption.split(" a large")[0] for seed in range(60)}
    assert len(openings) == 4
    assert len({replace(PAIR, seed=seed).long_caption.split(".")[1] for seed in range(60)}) == 3
    assert sample_scene(7).long_caption == sample_scene(7).long_caption


def test_mixed_captions_are_long_for_two_in_three() -> None:
    scenes = list(training_scenes(0, 300))
    assert sum(scene.mixed_caption == scene.long_caption for scene in scenes) == 200
    assert sum(scene.mixed_caption == scene.caption for scene in scenes) == 100


def test_fragment_is_true_of_its_scene() -> None:
    rng = random.Random(0)
    seen = set()
    for scene in training_scenes(0, 500):
        fragment = scene.fragment(rng)
        words = [word for word in fragment.split() if word not in ("a", "objects", "background")]
        seen.add((len(fragment.split()), len(words)))
        if "background" in fragment or fragment in TEXTURES:
            assert set(words) <= {scene.texture, scene.tone}
        else:
            assert any(set(words) <= {thing.shape, thing.colour, thing.size} for thing in scene.objects)
    assert seen == {(1, 1), (2, 1), (3, 1), (3, 2), (4, 2)}


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_sampled_relation_holds_between_the_objects(relation: str) -> None:
    related = [scene for scene in training_scenes(0, 2000) if scene.relation == relation]
    assert related
    for scene in related:
        first, second = (thing.position.split() for thing in scene.objects)
        if relation in ("left of", "right of"):
            assert (first[1], second[1]) == (("left", "right") if relation == "left of" else ("right", "left"))
        else:
            assert (first[0], second[0]) == (("top", "bottom") if relation == "above" else ("bottom", "top"))


def test_prompt_sets_are_held_out_have_complete_captions_and_share_no_seed() -> None:
    sets = [evaluation_scenes(20, 30), calibration_scenes(32), simple_scenes(20), complex_scenes(20)]
    scenes = [scene for part in sets for scene in part]
    assert len({scene.seed for scene in scenes}) == len(scenes)
    for scene in scenes:
        assert all(thing.is_held_out for thing in scene.objects)
        assert all(scene.mentions_sizes)
        assert all(scene.mentions_positions)
        assert scene.mentions_background


def test_prompt_sets_have_the_documented_content() -> None:
    assert [len(scene.objects) for scene in evaluation_scenes(2, 4)] == [1, 1, 2, 3, 4, 2]
    assert all((len(scene.objects), scene.texture) == (1, "plain") for scene in simple_scenes(10))
    assert all((len(scene.objects), scene.texture) == (4, "busy") for scene in complex_scenes(10))
    mixed = [(len(scene.objects), scene.texture) for scene in calibration_scenes(16)]
    assert set(mixed) == {(number, texture) for number in range(1, 5) for texture in TEXTURES}
    assert {number for number, _ in mixed[:4]} == {1, 2, 3, 4}
    assert {texture for _, texture in mixed[:4]} == set(TEXTURES)


def test_short_prompts_name_shapes_colours_and_relations_alone() -> None:
    related, sparse = related_scenes(40), sparse_scenes(8)
    for scene in related:
        first, second = scene.objects
        assert scene.caption == f"a {first.colour} {first.shape} {scene.relation} a {second.colour} {second.shape}"
    assert {scene.relation for scene in related} == set(RELATIONS)
    assert [len(scene.objects) for scene in sparse] == [1, 2, 3, 4, 1, 2, 3, 4]
    for scene in sparse:
        assert scene.caption == ", ".join(f"a {thing.colour} {thing.shape}" for thing in scene.objects)
    assert all(thing.is_held_out for scene in related + sparse for thing in scene.objects)
    assert len({scene.seed for scene in related + sparse}) == 48


def test_larger_prompt_set_starts_with_the_smaller_one() -> None:
    assert related_scenes(10)[:4] == related_scenes(4)
    assert calibration_scenes(20)[:8] == calibration_scenes(8)
    assert evaluation_scenes(10, 0)[:4] == evaluation_scenes(4, 0)
