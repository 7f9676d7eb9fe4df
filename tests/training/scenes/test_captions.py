import random
import re

import pytest

from training.scenes.captions import captioned_scene, complete, draw_caption, wording
from training.scenes.scenes import COLOURS, POSITIONS, RELATIONS, SHAPES, TEXTURES, TONES, Scene

SCENES = [captioned_scene(seed) for seed in range(1500)]
STANDARD = {  # synonyms, and several words for one place
    "big": "large",
    "little": "small",
    "tiny": "small",
    "gray": "grey",
    "upper": "top",
    "lower": "bottom",
    "over": "above",
    "under": "below",
    "center": "centre",
    "middle": "centre",
}


def standard(text: str) -> str:
    return " ".join(STANDARD.get(word, word) for word in re.findall(r"\w+", text.lower()))


def captions() -> list[tuple[Scene, str]]:
    rng = random.Random(0)
    said = [complete(scene) if rng.random() < 0.3 else scene for scene in SCENES]
    return [(scene, standard(wording(scene, rng))) for scene in said]


def test_wording_names_every_object_in_order_with_what_the_caption_mentions() -> None:
    for scene, text in captions():
        expected = []
        for thing, size, position in zip(scene.objects, scene.mentions_sizes, scene.mentions_positions, strict=True):
            words = [thing.size] if size else []
            expected.append((" ".join([*words, thing.colour, thing.shape]), thing.position if position else ""))
        found = re.findall(
            rf"((?:small |large )?(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}))"
            rf"(?: (?:at |in )?(?:the )?({'|'.join(POSITIONS)}))?",
            text,
        )
        assert found == expected


def test_what_a_caption_leaves_out_is_as_usual() -> None:
    for scene, text in captions():
        texture, tone = (next((w for w in kinds if f" {w}" in text), None) for kinds in (TEXTURES, TONES))
        assert (texture or "plain", tone or "light") == (scene.texture, scene.tone)
        for thing, size in zip(scene.objects, scene.mentions_sizes, strict=True):
            assert size or thing.size == "large"
        if not any(scene.mentions_positions):
            places = {thing.position for thing in scene.objects}
            column, row = {"top left", "bottom left"}, {"top left", "top right"}
            if scene.relation:
                assert places == (column if scene.relation in ("above", "below") else row)
            elif len(scene.objects) == 1:
                assert places == {"centre"}


def test_relation_in_the_words_holds_in_the_picture() -> None:
    first_places = {"above": "top left", "below": "bottom left", "left of": "top left", "right of": "top right"}
    seen = set()
    for scene, text in captions():
        named = [relation for relation in RELATIONS if f" {relation} " in text]
        assert named == ([scene.relation] if scene.relation else [])
        if scene.relation:
            assert scene.objects[0].position == first_places[scene.relation]
            seen.add(scene.relation)
    assert seen == set(RELATIONS)


def test_captioned_scenes_have_no_held_out_combination() -> None:
    assert not any(thing.is_held_out for scene in SCENES for thing in scene.objects)


def test_one_scene_has_many_captions_and_a_seed_one_scene() -> None:
    rng = random.Random(0)
    assert len({draw_caption(SCENES[0], rng, lambda scene: scene.caption) for _ in range(100)}) > 30
    assert captioned_scene(5) == SCENES[5]


def test_complete_caption_keeps_the_picture_and_mentions_all_of_it() -> None:
    for scene in SCENES[:200]:
        whole = complete(scene)
        assert (whole.objects, whole.tone, whole.texture, whole.seed) == (
            scene.objects,
            scene.tone,
            scene.texture,
            scene.seed,
        )
        assert all(whole.mentions_sizes)
        assert all(whole.mentions_positions)
        assert whole.mentions_background
        assert whole.relation is None


@pytest.mark.parametrize("pattern", [r"a \w+ \w+", r"a \w+ \w+ (above|below|left of|right of) a \w+ \w+"])
def test_captions_of_colour_shape_and_relation_alone_are_common(pattern: str) -> None:
    """They are what visitors type first."""
    rng = random.Random(0)
    drawn = [draw_caption(scene, rng, lambda scene: scene.caption) for scene in SCENES]
    assert sum(bool(re.fullmatch(pattern, text)) for text in drawn) > len(drawn) / 50


def test_background_that_is_unusual_in_one_way_is_always_named() -> None:
    rng = random.Random(0)
    odd = [s for s in SCENES if not s.mentions_background and (s.texture, s.tone) != ("plain", "light")]
    assert odd
    for scene in odd:
        text = standard(draw_caption(scene, rng, lambda scene: scene.caption))
        assert scene.texture in ("plain", *text.split())
        assert scene.tone in ("light", *text.split())


def test_caption_too_long_for_the_text_encoder_gets_the_short_form() -> None:
    scene = complete(next(scene for scene in SCENES if len(scene.objects) == 4))
    texts = [wording(scene, random.Random(seed)) for seed in range(200)]
    assert scene.caption in texts
    assert max(len(text.split()) for text in texts) <= 37
