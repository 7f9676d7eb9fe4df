"""Cleans up the triangles of a surface and reports on the resulting mesh."""

from dataclasses import dataclass

import fast_simplification
import numpy as np
import trimesh
from numpy.typing import NDArray

from models.errors import EmptySurface
from models.mesh.surface import Mesh
from models.report import MeshReport

FLOATER_RATIO = 0.005
"""Components with fewer faces than this share of the largest component's, rounded down, are removed. Hunyuan3D's
clean-up does this with pymeshlab."""

_AGGRESSION = 5
"""How fast the tolerance for a collapse grows. fast-simplification's default is 7; 5 gives fewer folds in as much time,
and 3 ends before small targets are reached."""

_STAGE = 10
"""Reductions by a larger factor go in stages: rotated boxes of 300,000 faces then reach 1000 instead of 1554."""

_JITTER = 1e-5
"""Share of the mesh's largest extent. This is less than 0.01 voxel."""


@dataclass(frozen=True, slots=True, eq=False)
class CleanMesh:
    mesh: Mesh
    report: MeshReport


def clean(mesh: Mesh, target_faces: int | None = None) -> CleanMesh:
    """`mesh` without repeated vertices, degenerate and duplicate faces, and floaters, reduced to `target_faces` faces.

    A face with a repeated vertex is degenerate; removing it leaves no hole. Faces of the result are consistently
    oriented, and its volume is positive. Nothing is reduced without `target_faces`, or if there are no more faces than
    that. More than `target_faces` remain where fewer would ruin the shape, which was seen on simple solids from 1000
    downwards; the report has the number.
    Raises `EmptySurface` if nothing is left.
    """
    body = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    body.merge_vertices()
    _drop_faces_without_volume(body)
    _require_faces(body, mesh)
    if not body.is_winding_consistent:
        trimesh.repair.fix_winding(body)
    if body.volume < 0:
        body.invert()
    num_removed_floaters = _remove_floaters(body)
    if target_faces is not None:
        body = _reduced(body, target_faces)
        _require_faces(body, mesh)
    report = MeshReport(
        num_vertices=len(body.vertices),
        num_faces=len(body.faces),
        num_components=len(np.unique(_component_of_faces(body))),
        num_removed_floaters=num_removed_floaters,
        is_watertight=bool(body.is_watertight and body.is_winding_consistent),
    )
    return CleanMesh(Mesh(body.vertices.astype(np.float32), body.faces.astype(np.int32)), report)


def _require_faces(body: trimesh.Trimesh, source: Mesh) -> None:
    if not len(body.faces):
        raise EmptySurface(f"no surface is left of {len(source.faces)} faces after clean-up")


def _drop_faces_without_volume(body: trimesh.Trimesh) -> None:
    """Of several faces over the same three vertices keep one, or none where they face opposite ways, as in a flat fold.

    Keeping one side of a fold would leave an edge with three faces.
    """
    faces = np.sort(body.faces, axis=1)
    has_three_vertices = (np.diff(faces, axis=1) > 0).all(axis=1)
    _, triple = trimesh.grouping.unique_rows(faces)
    # With the smallest vertex first, a face and its reverse differ in the order of the other two vertices.
    turned = (body.faces.argmin(axis=1)[:, None] + (1, 2)) % 3
    second, third = np.take_along_axis(body.faces, turned, axis=1).T
    side = np.where(second < third, 1, -1)
    majority = np.sign(np.bincount(triple, weights=side))
    candidates = np.flatnonzero(has_three_vertices & (side == majority[triple]))
    _, first = np.unique(triple[candidates], return_index=True)
    body.update_faces(np.sort(candidates[first]))
    body.remove_unreferenced_vertices()


def _component_of_faces(body: trimesh.Trimesh) -> NDArray[np.int64]:
    """The component of each face, numbered from 0. Faces that share a vertex belong to one component."""
    of_vertices = trimesh.graph.connected_component_labels(body.edges_unique, node_count=len(body.vertices))
    of_faces: NDArray[np.int64] = of_vertices[body.faces[:, 0]]
    return of_faces


def _remove_floaters(body: trimesh.Trimesh) -> int:
    component = _component_of_faces(body)
    num_faces = np.bincount(component)
    is_floater = num_faces < int(FLOATER_RATIO * num_faces.max(initial=0))
    body.update_faces(~is_floater[component])
    body.remove_unreferenced_vertices()
    return int(is_floater.sum())


def _reduced(body: trimesh.Trimesh, target_faces: int) -> trimesh.Trimesh:
    """Edge collapses by quadric error (Garland and Heckbert 1997), with fast-simplification.

    The tolerance grows with each of its passes, so a reduction to few faces would make bad collapses while good ones
    are left. Therefore it is done in stages. A stage that misses its target is the last: another one would have no
    limit on the tolerance.
    """
    falls_short = False
    while len(body.faces) > target_faces and not falls_short:
        stage_target = max(target_faces, len(body.faces) // _STAGE)
        # On exact planes the quadrics are singular up to rounding, and a collapsed vertex can move far along the plane.
        # Without noise, meshes with flat sides kept more faces than asked for, or lost most of their volume.
        noise = np.random.default_rng(0).normal(size=body.vertices.shape) * (_JITTER * body.extents.max())
        vertices, faces = fast_simplification.simplify(
            body.vertices + noise, body.faces.astype(np.int32), target_count=stage_target, agg=_AGGRESSION
        )
        falls_short = len(faces) > stage_target
        body = trimesh.Trimesh(vertices, faces, process=False)
        _drop_faces_without_volume(body)  # some collapses fold two faces onto each other
    return body
