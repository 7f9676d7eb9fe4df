"""Which sizes a model can make."""

from models.card import SizeLimits


def nearest_size(pixels: int, sizes: SizeLimits) -> int:
    """The valid height or width nearest to `pixels`, the smaller of two equally near."""
    step = sizes.multiple_of
    lowest, highest = -(-sizes.minimum // step) * step, sizes.maximum // step * step
    return min(max((pixels + (step - 1) // 2) // step * step, lowest), highest)
