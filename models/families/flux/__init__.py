"""FLUX.1, as diffusers has it."""

from models.families.entry import DIFFUSERS, FamilyEntry, Reference

ENTRY = FamilyEntry(
    name="flux",
    family=Reference("models.families.flux.pipeline", "FluxFamily"),
    layout=DIFFUSERS,
    class_names=("FluxPipeline",),
)
