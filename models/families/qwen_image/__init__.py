"""Qwen-Image, as diffusers has it, and Elastic-DiT's checkpoint for it."""

from models.families.entry import DIFFUSERS, Converter, FamilyEntry, Reference

ENTRY = FamilyEntry(
    name="qwen_image",
    family=Reference("models.families.qwen_image.pipeline", "QwenImageFamily"),
    layout=DIFFUSERS,
    class_names=("QwenImagePipeline",),
    converters=(
        Converter(
            "elastic-dit", Reference("models.families.qwen_image.conversion", "convert_elastic_dit"), needs_base=True
        ),
    ),
)
