"""Captioned scenes of coloured shapes, on which the tiny image models are trained and judged.

A scene has one to four objects on a plain, striped, dotted or busy background. An object has a shape, a colour, a size
and a position. An integer seed determines a scene, so the data are unlimited, reproducible and need no storage.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white", "black")
SIZES = ("small", "large")
POSITIONS = ("top left", "top right", "bottom left", "bottom right", "centre")
TONES = ("light", "grey", "dark")
TEXTURES = ("plain", "striped", "dotted", "busy")
RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 4
_NUM_OBJECTS = (1, 1, 1, 2, 2, 2, 3, 3, 4, 4)  # of ten consecutive training scenes

_CORNERS = POSITIONS[:4]
_PAIRS_OF_RELATION = {
    "left of": (("top left", "top right"), ("bottom left", "bottom right")),
    "right of": (("top right", "top left"), ("bottom right", "bottom left")),
    "above": (("top left", "bottom left"), ("top right", "bottom right")),
    "below": (("bottom left", "top left"), ("bottom right", "top right")),
}


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object of a scene. The caption may leave out its `size` and `position`."""

    shape: str
    colour: str
    size: str
    position: str

    @property
    def is_held_out(self) -> bool:
        """Whether (shape, colour, position) is held out. A tenth of the combinations occur in no training scene."""
        digest = hashlib.sha256(f"{self.shape}/{self.colour}/{self.position}".encode()).digest()
        return digest[0] < 26


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of an image. `seed` determines the details no field names: offsets, shades, rotation, texture.

    `relation` is set if the caption places two objects only relative to each other. `mentions_sizes` and
    `mentions_positions` say for each object whether the caption mentions its size and its position.
    """

    objects: tuple[SceneObject, ...]
    tone: str
    texture: str
    mentions_sizes: tuple[bool, ...]
    mentions_positions: tuple[bool, ...]
    mentions_background: bool
    relation: str | None
    is_terse: bool
    seed: int

    @property
    def caption(self) -> str:
        phrases = []
        for thing, size, position in zip(self.objects, self.mentions_sizes, self.mentions_positions, strict=True):
            words = f"{thing.size} {thing.colour} {thing.shape}" if size else f"{thing.colour} {thing.shape}"
            if not self.is_terse:
                words = f"a {words}"
            if position:
                link = "" if self.is_terse else "in the " if thing.position == "centre" else "at the "
                words += f" {link}{thing.position}"
            phrases.append(words)
        text = f" {self.relation} ".join(phrases) if self.relation else ", ".join(phrases)
        if not self.mentions_background:
            return text
        return f"{text}, {'' if self.is_terse else 'on a '}{self.texture} {self.tone} background"

    @property
    def long_caption(self) -> str:
        """The facts of the caption in whole sentences, in one of several wordings."""
        rng = random.Random(f"words-{self.seed}")
        things = []
        for thing, size, position in zip(self.objects, self.mentions_sizes, self.mentions_positions, strict=True):
            words = f"a {thing.size} {thing.colour} {thing.shape}" if size else f"a {thing.colour} {thing.shape}"
            if position:
                words += f" in the {thing.position}" if thing.position == "centre" else f" at the {thing.position}"
            things.append(words)
        if self.relation:
            listed = f" {self.relation} ".join(things)
        else:
            listed = " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)
        text = f"{rng.choice(_OPENINGS)} {listed}."
        if self.mentions_background:
            text += rng.choice(_BACKGROUNDS).format(texture=self.texture, tone=self.tone)
        return text

    @property
    def mixed_caption(self) -> str:
        """Qwen-Image's caption: whole sentences for two scenes in three, the short form for the third."""
        return self.caption if self.seed % 3 == 0 else self.long_caption

    def fragment(self, rng: random.Random) -> str:
        """A few words that are true of the scene, worded like a negative prompt."""
        thing = rng.choice(self.objects)
        return rng.choice(
            (
                thing.colour,
                thing.shape,
                f"{thing.size} objects",
                f"{thing.colour} objects",
                self.texture,
                f"a {thing.colour} {thing.shape}",
                f"{self.texture} background",
                f"a {self.texture} background",
                f"{self.tone} background",
                f"a {self.texture} {self.tone} background",
            )
        )


_OPENINGS = ("A picture of", "A drawing that shows", "An image with", "This simple picture shows")
_BACKGROUNDS = (
    " The background is {texture} and {tone}.",
    " Behind is a {texture} {tone} background.",
    " Everything stands on a {texture} background in a {tone} tone.",
)


def sample_scene(
    seed: int,
    *,
    held_out: bool = False,
    num_objects: int | None = None,
    texture: str | None = None,
    mentions_all: bool = False,
) -> Scene:
    """Draw the content of scene `seed`.

    Half of the scenes have one object, because models learn shapes last. `held_out=True` draws only held-out
    combinations, `False` only the others. With `mentions_all` the caption mentions every attribute.
    """
    rng = random.Random(f"scene-{seed}-{held_out}-{num_objects}-{texture}-{mentions_all}")
    count = num_objects or rng.choices((1, 2, 3, 4), weights=(50, 25, 13, 12))[0]
    relation = rng.choice(RELATIONS) if count == 2 and not mentions_all and rng.random() < 0.35 else None
    if count == 1:
        places: tuple[str, ...] = (rng.choice(POSITIONS),)
    elif relation:
        places = rng.choice(_PAIRS_OF_RELATION[relation])
    else:
        places = tuple(rng.sample(_CORNERS, count))
    objects = tuple(_sample_object(rng, place, held_out) for place in places)
    mentions_positions = relation is None and (mentions_all or count > 2 or rng.random() < 0.85)
    return Scene(
        objects=objects,
        tone=rng.choice(TONES),
        texture=texture or rng.choices(TEXTURES, weights=(46, 18, 18, 18))[0],
        mentions_sizes=tuple(mentions_all or rng.random() < 0.85 for _ in objects),
        mentions_positions=(mentions_positions,) * count,
        mentions_background=mentions_all or rng.random() < 0.85,
        relation=relation,
        is_terse=not mentions_all and rng.random() < 0.15,
        seed=seed,
    )


def _sample_object(rng: random.Random, position: str, held_out: bool) -> SceneObject:
    while True:
        thing = SceneObject(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES), position)
        if thing.is_held_out == held_out:
            return thing


def training_scene(seed: int) -> Scene:
    """Scene `seed` of the endless training stream: three in ten have one object, three two, two three and two four."""
    return sample_scene(seed, num_objects=_NUM_OBJECTS[seed % len(_NUM_OBJECTS)])


def training_scenes(start: int, count: int) -> Iterator[Scene]:
    """Scenes `start` to `start + count - 1` of the endless training stream."""
    return map(training_scene, range(start, start + count))
