"""The demo with the real application."""

from pathlib import Path

import trimesh
from fastapi.testclient import TestClient

from elastic_dit_client import Client
from examples import demo
from examples.demo import generate_images, generate_meshes, save, table
from models.curve import Preset


def test_server_answers_all_that_the_demo_asks(client: TestClient, tmp_path: Path) -> None:
    server = Client("http://testserver", http=client)
    images = generate_images(server)
    assert len(images) == len(Preset) * (len(demo.PROMPTS) + 2)
    assert {image.row.model for image in images} == {"drawn", "guided"}
    save(images, tmp_path)
    assert (tmp_path / "contact_sheet.png").is_file()
    assert "guided: mean of 2 rows" in table(images)
    meshes = generate_meshes(server, tmp_path)
    assert [(mesh.row.model, mesh.preset) for mesh in meshes] == [("ball", preset) for preset in Preset]
    assert "ball: mean of 1 rows" in table(meshes)
    for preset in Preset:
        loaded = trimesh.load(tmp_path / f"mesh-{preset}.glb", force="mesh")
        assert isinstance(loaded, trimesh.Trimesh)
        assert loaded.is_watertight
