"""Qwen-Image-Edit, for one picture, and Qwen-Image-Edit-Plus (2509), for several, as diffusers has them."""

from models.families.entry import DIFFUSERS, FamilyEntry, Reference

ENTRY = FamilyEntry(
    name="qwen_image_edit",
    family=Reference("models.families.qwen_image_edit.pipeline", "QwenImageEditFamily"),
    layout=DIFFUSERS,
    class_names=("QwenImageEditPipeline",),
)
PLUS_ENTRY = FamilyEntry(
    name="qwen_image_edit_plus",
    family=Reference("models.families.qwen_image_edit.pipeline", "QwenImageEditPlusFamily"),
    layout=DIFFUSERS,
    class_names=("QwenImageEditPlusPipeline",),
)
