"""From a decoded field to the file of a mesh. No torch: the server runs this in a process of its own."""

from dataclasses import dataclass

from models.file_formats import MeshFormat
from models.mesh.cleanup import clean
from models.mesh.formats import encode_mesh
from models.mesh.surface import FieldSamples, extract_surface
from models.report import MeshReport


@dataclass(frozen=True, slots=True)
class MeshFile:
    data: bytes
    report: MeshReport


def make_mesh_file(samples: FieldSamples, target_faces: int | None, mesh_format: MeshFormat) -> MeshFile:
    """The file of the surface of a field. Raises `EmptySurface` if there is none."""
    cleaned = clean(extract_surface(samples.grid_logits()), target_faces)
    return MeshFile(encode_mesh(cleaned.mesh, mesh_format), cleaned.report)
