"""The captions that image models are trained on: what they leave unsaid, and the words for the rest.

A scene has many captions. Each time that a scene is shown, another one is drawn.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from training.scenes.scenes import RELATIONS, Scene, training_scene

_MAX_WORDS = 36
"""T5 reads 40 tokens."""
_SIZES = {"small": ("small",) * 3 + ("little", "tiny"), "large": ("large",) * 3 + ("big", "big")}
_CORNERS = ("at the {}", "in the {}", "at {}", "in the {} corner", "at the {} corner")
_CENTRES = ("in the centre", "in the center", "in the middle", "at the centre")
_VERTICAL = {"top": ("top", "top", "upper"), "bottom": ("bottom", "bottom", "lower")}
_RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
}
_USUAL_PAIRS = {
    "left of": ("top left", "top right"),
    "right of": ("top right", "top left"),
    "above": ("top left", "bottom left"),
    "below": ("bottom left", "top left"),
}
_USUAL_PLACES = {
    1: ("centre",),
    2: ("top left", "bottom right"),
    3: ("top left", "top right", "bottom left"),
    4: ("top left", "top right", "bottom left", "bottom right"),
}
_ARTICLES = ("a",) * 7 + ("one", "", "")
_OPENINGS = ("",) * 10 + (
    "a picture of",
    "a picture of",
    "an image of",
    "an image with",
    "a drawing of",
    "a drawing that shows",
    "this simple picture shows",
    "a painting of",
    "a photo of",
    "a simple picture of",
    "there is",
    "there is",
    "draw",
    "draw me",
    "please draw",
    "paint",
    "show",
    "show me",
)
_BACKGROUNDS = (", on a {} background",) * 4 + (
    " on a {} background",
    " on a {} background",
    ", {} background",
    " against a {} background",
    " with a {} background",
)


def captioned_scene(seed: int) -> Scene:
    """Training scene `seed` with a caption that leaves things out. What it leaves out is as usual in the picture.

    Usual are large objects on a plain light background, a single one in the centre, two with a relation in the left
    column or the top row. So a short caption stands for one layout. Half of the captions say nothing but shapes,
    colours and a relation. No object is a held-out combination.
    """
    rng = random.Random(f"caption-{seed}")
    while True:
        scene = _with_usual_rest(training_scene(seed), rng)
        if not any(thing.is_held_out for thing in scene.objects):
            return scene


def _with_usual_rest(scene: Scene, rng: random.Random) -> Scene:
    count = len(scene.objects)
    is_brief = rng.random() < 0.5
    sizes = 0.0 if is_brief else rng.choice((0.0, 0.5, 1.0))
    mentions_sizes = tuple(rng.random() < sizes for _ in scene.objects)
    mentions_positions = rng.random() < (0.15 if is_brief else 0.6)
    mentions_background = not is_brief and rng.random() < 0.6
    relation = rng.choice(RELATIONS) if count == 2 and not mentions_positions and rng.random() < 0.7 else None
    places = _USUAL_PAIRS[relation] if relation else _USUAL_PLACES[count]
    if mentions_positions:
        places = tuple(thing.position for thing in scene.objects)
    sizes_shown = (t.size if said else "large" for t, said in zip(scene.objects, mentions_sizes, strict=True))
    objects = tuple(
        replace(thing, size=size, position=place)
        for thing, size, place in zip(scene.objects, sizes_shown, places, strict=True)
    )
    odd = rng.random()  # a background that is unusual in one way; `wording` names it
    return replace(
        scene,
        objects=objects,
        texture=scene.texture if mentions_background or odd < 0.12 else "plain",
        tone=scene.tone if mentions_background or odd > 0.85 else "light",
        mentions_sizes=mentions_sizes,
        mentions_positions=(mentions_positions,) * count,
        mentions_background=mentions_background,
        relation=relation,
        is_terse=rng.random() < 0.15,
    )


def draw_caption(scene: Scene, rng: random.Random, family_caption: Callable[[Scene], str]) -> str:
    """A random caption of the scene: complete or with the scene's omissions, worded by `family_caption` or freely."""
    said = complete(scene) if rng.random() < 0.3 else scene
    is_whole = said.mentions_background or not _names_background(said)
    return family_caption(said) if is_whole and rng.random() < 0.4 else wording(said, rng)


def _names_background(scene: Scene) -> bool:
    """Whether the caption has words for the background: if it mentions it, or if it is unusual."""
    return scene.mentions_background or (scene.texture, scene.tone) != ("plain", "light")


def complete(scene: Scene) -> Scene:
    """The scene with a caption that mentions every attribute."""
    everything = (True,) * len(scene.objects)
    return replace(
        scene,
        mentions_sizes=everything,
        mentions_positions=everything,
        mentions_background=True,
        relation=None,
        is_terse=False,
    )


def wording(scene: Scene, rng: random.Random) -> str:
    """The facts of the scene's caption in one of many wordings."""
    article = rng.choice(_ARTICLES)
    place = _CORNERS[0] if rng.random() < 0.5 else rng.choice(_CORNERS)
    things = []
    for thing, says_size, says_position in zip(
        scene.objects, scene.mentions_sizes, scene.mentions_positions, strict=True
    ):
        words = [article, rng.choice(_SIZES[thing.size]) if says_size else "", thing.colour, thing.shape]
        if says_position and thing.position == "centre":
            words.append(rng.choice(_CENTRES))
        elif says_position:
            vertical, horizontal = thing.position.split()
            words.append(place.format(f"{rng.choice(_VERTICAL[vertical])} {horizontal}"))
        things.append(" ".join(filter(None, words)))
    opening = rng.choice(_OPENINGS)
    if scene.relation:
        link = rng.choice(_RELATIONS[scene.relation])
        verb = "is " if not opening and article and rng.random() < 0.2 else ""
        text = f"{things[0]} {verb}{link} {things[1]}"
    else:
        text = _listed(things, rng)
    text = f"{opening} {text}".strip() + _background(scene, rng)
    if len(text.split()) > _MAX_WORDS:
        return replace(scene, mentions_background=_names_background(scene)).caption
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return f"{text}." if rng.random() < 0.3 else text


def _listed(things: Sequence[str], rng: random.Random) -> str:
    last = rng.choice((", ", " and ", " and ", ", and ", " with "))
    return last.join(filter(None, (", ".join(things[:-1]), things[-1])))


def _background(scene: Scene, rng: random.Random) -> str:
    """The words for the background. A caption that leaves it out still names what is unusual: its texture or tone."""
    tone = rng.choice(("grey", "grey", "gray")) if scene.tone == "grey" else scene.tone
    said = rng.choice((f"{scene.texture} {tone}", f"{scene.texture} {tone}", f"{tone} {scene.texture}"))
    if not scene.mentions_background:
        said = " ".join(
            filter(None, (scene.texture if scene.texture != "plain" else "", tone if tone != "light" else ""))
        )
        if not said:
            return ""
    elif rng.random() < 0.15:
        return f". The background is {scene.texture} and {tone}"
    return rng.choice(_BACKGROUNDS).format(said)
