"""The prompt sets: fixed held-out scenes. Their captions mention every attribute, those of two sets very few.

Each set has its own range of seeds, so the sets share no scene. Training uses seeds from 0, the judge from 5 and 6
million, the samples drawn during training from 10^9.
"""

from dataclasses import replace
from itertools import count as count_from
from itertools import islice

from training.scenes.scenes import MAX_OBJECTS, TEXTURES, Scene, sample_scene

_EVALUATION_SINGLE = 2_000_000_000
_EVALUATION_MULTI = 2_010_000_000
_CALIBRATION = 2_020_000_000
_SIMPLE = 2_030_000_000
_COMPLEX = 2_040_000_000
_RELATED = 2_050_000_000
_SPARSE = 2_060_000_000


def evaluation_scenes(count_single: int, count_multi: int) -> list[Scene]:
    """`count_single` scenes of one object, then `count_multi` of two, three and four objects in turn.

    Backgrounds are distributed as in training. In both parts, a larger set starts with the smaller set.
    """
    single = [_scene(_EVALUATION_SINGLE + i, 1) for i in range(count_single)]
    multi = [_scene(_EVALUATION_MULTI + i, 2 + i % (MAX_OBJECTS - 1)) for i in range(count_multi)]
    return single + multi


def calibration_scenes(count: int) -> list[Scene]:
    """Mixed scenes. Scenes 4 i to 4 i + 3 have every number of objects once and every texture once.

    Any 16 consecutive scenes have every pair of number and texture once.
    """
    return [
        _scene(_CALIBRATION + i, 1 + i % MAX_OBJECTS, TEXTURES[(i + i // MAX_OBJECTS) % len(TEXTURES)])
        for i in range(count)
    ]


def simple_scenes(count: int) -> list[Scene]:
    """One object on a plain background: scenes that should need little compute."""
    return [_scene(_SIMPLE + i, 1, "plain") for i in range(count)]


def complex_scenes(count: int) -> list[Scene]:
    """Four objects on a busy background."""
    return [_scene(_COMPLEX + i, MAX_OBJECTS, "busy") for i in range(count)]


def related_scenes(count: int) -> list[Scene]:
    """Two objects whose captions have shapes, colours and a relation only."""
    drawn = (sample_scene(seed, held_out=True, num_objects=2) for seed in count_from(_RELATED))
    return [_briefly(scene) for scene in islice((scene for scene in drawn if scene.relation), count)]


def sparse_scenes(count: int) -> list[Scene]:
    """One to four objects in turn, whose captions have shapes and colours only."""
    return [_briefly(_scene(_SPARSE + i, 1 + i % MAX_OBJECTS)) for i in range(count)]


def _briefly(scene: Scene) -> Scene:
    nothing = (False,) * len(scene.objects)
    return replace(scene, mentions_sizes=nothing, mentions_positions=nothing, mentions_background=False, is_terse=False)


def _scene(seed: int, num_objects: int, texture: str | None = None) -> Scene:
    return sample_scene(seed, held_out=True, num_objects=num_objects, texture=texture, mentions_all=True)
