"""Draw meshes without a display or GPU: Embree casts the rays, and each face is shaded flat.

Camera and field of view equal those of `training.solids.rendering`, so a mesh can be laid over its input image.
"""

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image
from trimesh.ray.ray_pyembree import RayMeshIntersector

from models.mesh.surface import Mesh
from training.solids.rendering import CAMERA_DISTANCE, FIELD_OF_VIEW

_SUBPIXELS = 3
"""Per side of a pixel."""

_CLAY = np.array((0.62, 0.68, 0.76))
_LIGHT = np.array((-0.45, 0.65, 0.61))
"""Direction to the light: from above, behind the viewer's left shoulder."""


def draw_mesh(mesh: Mesh, size: int) -> Image.Image:
    """An RGB image of the mesh on white, `size` pixels per side."""
    body = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    directions = _directions(size * _SUBPIXELS)
    origins = np.broadcast_to((0.0, 0.0, CAMERA_DISTANCE), directions.shape)
    face = RayMeshIntersector(body).intersects_first(origins, directions)
    is_hit = face >= 0
    colour = np.ones((len(directions), 3))
    colour[is_hit] = _shade(body.face_normals[face[is_hit]], directions[is_hit])
    pixels = colour.reshape(size, _SUBPIXELS, size, _SUBPIXELS, 3).mean(axis=(1, 3))
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _directions(size: int) -> NDArray[np.float64]:
    """Unit vectors from the camera through the pixels, row by row from the top left, `(pixels, 3)`."""
    across = ((np.arange(size) + 0.5) * (2 / size) - 1) * np.tan(FIELD_OF_VIEW / 2)
    y, x = np.meshgrid(-across, across, indexing="ij")
    rays = np.stack((x, y, -np.ones_like(x)), axis=-1).reshape(-1, 3)
    unit: NDArray[np.float64] = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    return unit


def _shade(normals: NDArray[np.float64], directions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colours `(pixels, 3)`: ambient and diffuse light, and a weak light at the camera. Inner sides are red."""
    facing = -(normals * directions).sum(axis=1)
    strength = 0.25 + 0.3 * facing.clip(min=0) + 0.5 * (normals @ _LIGHT).clip(min=0)
    colours: NDArray[np.float64] = (strength[:, None] * _CLAY * 1.25).clip(0, 1)
    colours[facing < 0] = (0.8, 0.2, 0.2)
    return colours
