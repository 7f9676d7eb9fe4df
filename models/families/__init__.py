"""The model families there are: one line each. A family's package is light; what computes is imported when used."""

from collections.abc import Mapping

from models.families import flux, hunyuan3d, qwen_image
from models.families.entry import FamilyEntry

FAMILIES: Mapping[str, FamilyEntry] = {
    "flux": flux.ENTRY,
    "qwen_image": qwen_image.ENTRY,
    "hunyuan3d": hunyuan3d.ENTRY,
}
