"""Encodes meshes as files. All formats keep the mesh's axes: y is up, as in glTF."""

from typing import Any

import trimesh
from trimesh.exchange.gltf import export_glb
from trimesh.exchange.obj import export_obj
from trimesh.exchange.ply import export_ply
from trimesh.exchange.stl import export_stl
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from models.file_formats import MeshFormat
from models.mesh.surface import Mesh

_GENERATOR = "elastic-dit-serve"


def encode_mesh(mesh: Mesh, mesh_format: MeshFormat) -> bytes:
    """The bytes of the file for `mesh`. Equal meshes give equal bytes.

    GLB, OBJ and PLY have a normal for each vertex: the mean of its faces' normals, weighted by angle. STL has one for
    each face.
    """
    body = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    data: str | bytes
    match mesh_format:
        case MeshFormat.GLB:
            data = _glb(body)
        case MeshFormat.OBJ:
            data = export_obj(body, include_normals=True, header=_GENERATOR)
        case MeshFormat.STL:
            data = export_stl(body)
        case MeshFormat.PLY:
            data = export_ply(body, vertex_normal=True)
    return data if isinstance(data, bytes) else data.encode("ascii")


def _glb(body: trimesh.Trimesh) -> bytes:
    def name_generator(tree: dict[str, Any]) -> None:
        tree["asset"]["generator"] = _GENERATOR

    # glTF's default material is metal, which is black in viewers without surroundings to reflect.
    clay = PBRMaterial(metallicFactor=0.0, roughnessFactor=0.8, baseColorFactor=[0.8, 0.8, 0.8, 1.0])
    body.visual = TextureVisuals(material=clay)
    scene = trimesh.Scene()
    scene.add_geometry(body, geom_name="mesh", node_name="mesh")
    data: bytes = export_glb(scene, include_normals=True, tree_postprocessor=name_generator)
    return data
