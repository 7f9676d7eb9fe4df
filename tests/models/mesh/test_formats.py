import io
import json
import struct
from typing import Any

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.file_formats import MeshFormat
from models.mesh.formats import encode_mesh
from models.mesh.surface import Mesh


def mesh_of(body: trimesh.Trimesh) -> Mesh:
    return Mesh(np.asarray(body.vertices, np.float32), np.asarray(body.faces, np.int32))


def tall_box() -> trimesh.Trimesh:
    """Its top is smaller than its base, y being up."""
    body = trimesh.creation.box((0.4, 1.6, 0.8))
    body.vertices[body.vertices[:, 1] > 0] *= (0.5, 1, 0.5)
    return body.subdivide().subdivide()


def tree_of(glb: bytes) -> tuple[Any, bytes]:
    """The JSON of a GLB file and its buffer."""
    length = int.from_bytes(glb[12:16], "little")
    return json.loads(glb[20 : 20 + length]), glb[28 + length :]


def written_normals(data: bytes, mesh_format: MeshFormat) -> NDArray[np.float32]:
    """As they stand in the file: readers would compute those that lack."""
    match mesh_format:
        case MeshFormat.GLB:
            tree, buffer = tree_of(data)
            accessor = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"]["NORMAL"]]
            offset = tree["bufferViews"][accessor["bufferView"]]["byteOffset"] + accessor["byteOffset"]
            return np.frombuffer(buffer, np.float32, 3 * accessor["count"], offset).reshape(-1, 3)
        case MeshFormat.OBJ:
            lines = [line.split()[1:] for line in data.decode().splitlines() if line.startswith("vn ")]
            return np.array(lines, np.float32)
        case MeshFormat.STL:
            triangle = np.dtype([("normal", np.float32, 3), ("vertices", np.float32, 9), ("attribute", np.uint16)])
            return np.frombuffer(data, triangle, offset=84)["normal"]
        case MeshFormat.PLY:
            head, _, body = data.partition(b"end_header\n")
            count = int(head.partition(b"element vertex ")[2].split()[0])
            assert [line.split()[-1] for line in head.splitlines() if b"float" in line][3:] == [b"nx", b"ny", b"nz"]
            return np.frombuffer(body, np.float32, 6 * count).reshape(-1, 6)[:, 3:]


def reread(data: bytes, mesh_format: MeshFormat) -> trimesh.Trimesh:
    body = trimesh.load(io.BytesIO(data), file_type=mesh_format.value, force="mesh", process=False)
    assert isinstance(body, trimesh.Trimesh)
    return body


@pytest.mark.parametrize("mesh_format", MeshFormat)
def test_files_hold_the_mesh_outside_out_in_its_own_frame(mesh_format: MeshFormat) -> None:
    body = tall_box()
    found = reread(encode_mesh(mesh_of(body), mesh_format), mesh_format)
    assert len(found.faces) == len(body.faces)
    np.testing.assert_allclose(found.triangles, body.triangles, atol=1e-6)
    assert found.volume == pytest.approx(body.volume, rel=1e-5)
    assert found.volume > 0


@pytest.mark.parametrize("mesh_format", MeshFormat)
def test_normals_in_files_look_outward(mesh_format: MeshFormat) -> None:
    """Of a ball around 0 they are its vertices, or, in STL, the directions of its faces' centres."""
    ball = trimesh.creation.icosphere(subdivisions=4)
    expected = trimesh.unitize(ball.triangles_center) if mesh_format is MeshFormat.STL else ball.vertices
    np.testing.assert_allclose(
        written_normals(encode_mesh(mesh_of(ball), mesh_format), mesh_format), expected, atol=0.01
    )


@pytest.mark.parametrize("mesh_format", MeshFormat)
def test_the_same_mesh_gives_the_same_bytes(mesh_format: MeshFormat) -> None:
    first, second = (encode_mesh(mesh_of(tall_box()), mesh_format) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("mesh_format", MeshFormat)
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_any_vertices_come_back_as_they_were(mesh_format: MeshFormat, seed: int) -> None:
    body = trimesh.creation.icosphere(subdivisions=2)
    body.vertices *= np.random.default_rng(seed).uniform(0.5, 1.0, (len(body.vertices), 1))
    mesh = mesh_of(body)
    found = reread(encode_mesh(mesh, mesh_format), mesh_format)
    np.testing.assert_allclose(found.triangles, mesh.vertices[mesh.faces], atol=1e-6)


def test_viewers_show_a_glb_as_clay() -> None:
    """What the specification wants of its head, and no default material, which is metal: black in most viewers."""
    data = encode_mesh(mesh_of(tall_box()), MeshFormat.GLB)
    magic, version, length = struct.unpack("<4sII", data[:12])
    assert (magic, version, length) == (b"glTF", 2, len(data))
    tree, _ = tree_of(data)
    primitive = tree["meshes"][0]["primitives"][0]
    material = tree["materials"][primitive["material"]]["pbrMetallicRoughness"]
    assert material.get("metallicFactor", 1) == 0
    assert "NORMAL" in primitive["attributes"]
    position = tree["accessors"][primitive["attributes"]["POSITION"]]
    assert position["max"][1] == pytest.approx(0.8)  # y is up, without any transformation of a node
    assert all("rotation" not in node and "scale" not in node for node in tree["nodes"])
    assert all(np.allclose(node["matrix"], np.eye(4).flatten()) for node in tree["nodes"] if "matrix" in node)


@pytest.mark.parametrize(
    ("mesh_format", "content_type"),
    [
        (MeshFormat.GLB, "model/gltf-binary"),
        (MeshFormat.OBJ, "model/obj"),
        (MeshFormat.STL, "model/stl"),
        (MeshFormat.PLY, "application/ply"),
    ],
)
def test_formats_have_their_content_type(mesh_format: MeshFormat, content_type: str) -> None:
    assert mesh_format.content_type == content_type
