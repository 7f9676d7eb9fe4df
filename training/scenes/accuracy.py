"""Prompt accuracy: how well a judge's readings of images agree with the captions.

Scoring follows GenEval (Ghosh et al. 2023, https://arxiv.org/abs/2310.11513). An image follows its prompt if it has the
objects of the caption, with the attributes in the caption, and no other object.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from training.scenes.scenes import Scene, SceneObject

_CELL_OF_POSITION = {  # row and column
    "top left": (0, 0),
    "top right": (0, 2),
    "bottom left": (2, 0),
    "bottom right": (2, 2),
    "centre": (1, 1),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """The content of one image as a judge reads it. Objects are in the order of `scenes.POSITIONS`."""

    objects: tuple[SceneObject, ...]
    tone: str
    texture: str


@dataclass(frozen=True, slots=True)
class PromptAccuracy:
    """How well images follow their captions, as shares in [0, 1].

    `per_object` is the share of the captions' objects that were found. `per_scene` is the share of images that have all
    objects of their caption and no other object; as in GenEval, the background does not count. `by_attribute` has
    `shape`, `colour` and `size` over the captions' objects and `count` over images. It has `tone`, `texture` and
    `background` (both) over the captions that mention the background.
    """

    per_object: float
    per_scene: float
    by_attribute: Mapping[str, float]


def score_readings(scenes: Sequence[Scene], readings: Sequence[Reading]) -> PromptAccuracy:
    """Compare readings with the captions of the scenes."""
    verdicts = [_judge_scene(scene, reading) for scene, reading in zip(scenes, readings, strict=True)]
    tallies: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for name, outcomes in verdict.items():
            tallies.setdefault(name, []).extend(outcomes)
    shares = {name: sum(outcomes) / len(outcomes) for name, outcomes in tallies.items() if outcomes}
    return PromptAccuracy(shares.pop("object"), shares.pop("scene"), shares)


def _judge_scene(scene: Scene, reading: Reading) -> dict[str, list[bool]]:
    """Outcomes by name, under the best match of the caption's objects to found objects."""
    attributes = max(
        ([_attributes(scene, i, found) for i, found in enumerate(match)] for match in _matches(scene, reading.objects)),
        key=lambda match: (
            sum(all(checks.values()) for checks in match),
            sum(sum(checks.values()) for checks in match),
        ),
    )
    objects = [all(checks.values()) for checks in attributes]
    count = len(reading.objects) == len(scene.objects)
    outcomes = {"object": objects, "scene": [all(objects) and count], "count": [count]}
    for checks in attributes:
        for name, is_right in checks.items():
            outcomes.setdefault(name, []).append(is_right)
    if scene.mentions_background:
        tone, texture = reading.tone == scene.tone, reading.texture == scene.texture
        outcomes |= {"tone": [tone], "texture": [texture], "background": [tone and texture]}
    return outcomes


def _matches(scene: Scene, found: Sequence[SceneObject]) -> Iterator[tuple[SceneObject | None, ...]]:
    """All assignments of found objects, or None, to the caption's objects that agree with the captioned positions.

    A relation counts only if both of its objects are matched. If the two objects are swapped, one of them is right and
    the other is missing.
    """
    options = [
        (None, *(other for other in found if not mentions_position or other.position == thing.position))
        for thing, mentions_position in zip(scene.objects, scene.mentions_positions, strict=True)
    ]
    for match in itertools.product(*options):
        taken = [other.position for other in match if other]
        if len(set(taken)) < len(taken):
            continue
        if scene.relation and len(taken) == 2 and not _holds(scene.relation, taken[0], taken[1]):
            continue
        yield match


def _holds(relation: str, first: str, second: str) -> bool:
    """Whether the first position is left of, right of, above or below the second; diagonals count."""
    (row, column), (other_row, other_column) = _CELL_OF_POSITION[first], _CELL_OF_POSITION[second]
    return {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]


def _attributes(scene: Scene, index: int, found: SceneObject | None) -> dict[str, bool]:
    thing = scene.objects[index]
    outcome = {
        "shape": found is not None and found.shape == thing.shape,
        "colour": found is not None and found.colour == thing.colour,
    }
    if scene.mentions_sizes[index]:
        outcome["size"] = found is not None and found.size == thing.size
    return outcome
