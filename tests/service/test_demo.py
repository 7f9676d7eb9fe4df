"""The demo with the real application."""

from pathlib import Path

import trimesh
from fastapi.testclient import TestClient

from elastic_dit_client import Client
from examples import demo
from examples.demo import draw_all, make_meshes, save, table
from models.curve import Preset


def test_server_answers_all_that_the_demo_asks(client: TestClient, tmp_path: Path) -> None:
    server = Client("http://testserver", http=client)
    pictures = draw_all(server)
    assert len(pictures) == len(Preset) * (len(demo.PROMPTS) + 2)
    assert {picture.row.model for picture in pictures} == {"drawn", "guided"}
    save(pictures, tmp_path)
    assert (tmp_path / "contact_sheet.png").is_file()
    assert "guided: mean of 2 rows" in table(pictures)
    meshes = make_meshes(server, tmp_path)
    assert [(mesh.row.model, mesh.preset) for mesh in meshes] == [("ball", preset) for preset in Preset]
    assert "ball: mean of 1 rows" in table(meshes)
    for preset in Preset:
        loaded = trimesh.load(tmp_path / f"mesh-{preset}.glb", force="mesh")
        assert isinstance(loaded, trimesh.Trimesh)
        assert loaded.is_watertight
