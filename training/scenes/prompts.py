"""The prompt sets: held-out scenes whose captions tell everything, the same ones in every run.

Each set has seeds of its own, so no scene of one occurs in another one. Training draws from 0 upwards, the judge from
5 and 6 million, looks during training from 10^9.
"""

from training.scenes.scenes import MAX_OBJECTS, TEXTURES, Scene, sample_scene

_EVALUATION_SINGLE = 2_000_000_000
_EVALUATION_MULTI = 2_010_000_000
_CALIBRATION = 2_020_000_000
_SIMPLE = 2_030_000_000
_COMPLEX = 2_040_000_000


def evaluation_scenes(count_single: int, count_multi: int) -> list[Scene]:
    """`count_single` scenes of one object, then `count_multi` of two, three and four objects in turn.

    Backgrounds fall as in training. A larger set begins, in either part, with the smaller one.
    """
    single = [_scene(_EVALUATION_SINGLE + i, 1) for i in range(count_single)]
    multi = [_scene(_EVALUATION_MULTI + i, 2 + i % (MAX_OBJECTS - 1)) for i in range(count_multi)]
    return single + multi


def calibration_scenes(count: int) -> list[Scene]:
    """Mixed scenes: any 4 in a row from a multiple of 4 hold every number of objects and every texture once.

    Any 16 in a row hold every pair of a number and a texture once.
    """
    return [
        _scene(_CALIBRATION + i, 1 + i % MAX_OBJECTS, TEXTURES[(i + i // MAX_OBJECTS) % len(TEXTURES)])
        for i in range(count)
    ]


def simple_scenes(count: int) -> list[Scene]:
    """One object on a plain background: what little compute should suffice for."""
    return [_scene(_SIMPLE + i, 1, "plain") for i in range(count)]


def complex_scenes(count: int) -> list[Scene]:
    """Four objects on a busy background."""
    return [_scene(_COMPLEX + i, MAX_OBJECTS, "busy") for i in range(count)]


def _scene(seed: int, num_objects: int, texture: str | None = None) -> Scene:
    return sample_scene(seed, held_out=True, num_objects=num_objects, texture=texture, tells_all=True)
