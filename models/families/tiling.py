"""Large pictures pass their autoencoder in overlapping tiles, which are blended: diffusers' own tiling.

Up to `MOST_WHOLE_PIXELS` a picture is whole. The size alone decides, never what memory happens to be free: a result
must not depend on its companions.
"""

import copy
from typing import Any

from diffusers import AutoencoderKLQwenImage

from models.memory import MOST_WHOLE_PIXELS

_SIDES = range(64, 129, 4)
"""Sides that tiles can have, in latents: multiples of 4, so that the overlap of a quarter is a whole number. With fewer
sides to choose from, some sizes up to 2048 would end in tiles of less than 32 latents."""


def for_size(vae: Any, height: int, width: int, pixels_per_latent: int) -> Any:
    """`vae`, or, for pictures of more than `MOST_WHOLE_PIXELS`, a view of it with the same weights that tiles.

    Each call makes a view of its own, so that threads do not meet in it.
    """
    if height * width <= MOST_WHOLE_PIXELS:
        return vae
    side = _side_of_tiles(height // pixels_per_latent, width // pixels_per_latent)
    view, in_pixels = copy.copy(vae), side * pixels_per_latent
    if isinstance(vae, AutoencoderKLQwenImage):
        view.enable_tiling(in_pixels, in_pixels, in_pixels * 3 // 4, in_pixels * 3 // 4)
    else:
        view.enable_tiling()
        view.tile_sample_min_size, view.tile_latent_min_size = in_pixels, side
        view.tile_overlap_factor = 0.25
    return view


def _side_of_tiles(height: int, width: int) -> int:
    """The largest side whose last tiles are as wide and high as can be: thin ones see too little of the picture."""

    def last(length: int, side: int) -> int:
        return min(side, (length - 1) % (side * 3 // 4) + 1)

    return max(_SIDES, key=lambda side: (min(last(height, side), last(width, side)), side))
