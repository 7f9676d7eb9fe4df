"""A family of its own, as small as one can be: what the table of families needs to know about it."""

from models.families.entry import DIFFUSERS, FamilyEntry, Reference

ENTRY = FamilyEntry(
    name="toy",
    family=Reference("tests.models.families.toy_family.pipeline", "ToyFamily"),
    layout=DIFFUSERS,
    class_names=("ToyPipeline",),
)
