"""FLUX.1-Kontext, as diffusers has it."""

from models.families.entry import DIFFUSERS, FamilyEntry, Reference

ENTRY = FamilyEntry(
    name="flux_kontext",
    family=Reference("models.families.flux_kontext.pipeline", "FluxKontextFamily"),
    layout=DIFFUSERS,
    class_names=("FluxKontextPipeline",),
)
