"""The model families there are: one line each. A family's package is light; what computes is imported when used."""

from collections.abc import Mapping

from models.families import flux, flux_kontext, hunyuan3d, qwen_image, qwen_image_edit
from models.families.entry import FamilyEntry

FAMILIES: Mapping[str, FamilyEntry] = {
    "flux": flux.ENTRY,
    "flux_kontext": flux_kontext.ENTRY,
    "qwen_image": qwen_image.ENTRY,
    "qwen_image_edit": qwen_image_edit.ENTRY,
    "qwen_image_edit_plus": qwen_image_edit.PLUS_ENTRY,
    "hunyuan3d": hunyuan3d.ENTRY,
}
