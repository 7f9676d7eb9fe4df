"""Hunyuan3D-2.1 and 2.0, in the layout of their published repositories."""

from models.families.entry import Converter, FamilyEntry, Layout, Reference

ENTRY = FamilyEntry(
    name="hunyuan3d",
    family=Reference("models.families.hunyuan3d.pipeline", "Hunyuan3DFamily"),
    layout=Layout("the config.yaml of Hunyuan3D", Reference("models.families.hunyuan3d.layout", "denoiser_class")),
    class_names=("HunYuanDiTPlain", "Hunyuan3DDiT"),
    converters=(
        Converter(
            "hunyuan3d", Reference("models.families.hunyuan3d.conversion", "convert_hunyuan3d"), needs_base=False
        ),
    ),
)
