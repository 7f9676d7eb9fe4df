from fastapi.testclient import TestClient

from models.card import ImageCard


def test_models_are_listed_with_their_curves(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["drawn", "guided", "ball"]
    assert [model["guidance"] for model in listed["data"]] == ["distilled", "true", "true"]
    model = listed["data"][0]
    assert model["object"] == "model"
    assert model["sizes"] == {"multiple_of": 16, "minimum": 32, "maximum": 1024}
    assert model["defaults"] == {
        "size": "64x64",
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "strength": 0.8,
        "masked_strength": 1,
    }
    assert [point["preset"] for point in model["curve"]] == ["exact", "high", "balanced", "fast", "draft"]
    assert [point["expected_seconds"] for point in model["curve"]] == [2.0, 1.64, 1.28, 1.1, 0.92]
    assert model["curve"][1]["policy"]["skip_threshold"] == 0.2
    assert {point["steps"] for point in model["curve"]} == {None}
    assert client.get("/v1/models/drawn").json() == model


def test_points_say_how_many_steps_are_computed(client: TestClient, forecasting_card: ImageCard) -> None:
    model = client.get(f"/v1/models/{forecasting_card.id}").json()
    assert [point["steps"] for point in model["curve"]] == [
        None,
        {"computed": 4, "of": 8},
        {"computed": 2, "of": 8},
    ]
    assert [point["rule"] for point in model["curve"]] == ["dense", "forecast", "forecast"]
    assert [(point["quality"], point["mean_quality"]) for point in model["curve"]] == [(1, 1), (0.9, 0.95), (0.6, 0.7)]


def test_unknown_model_is_not_found(client: TestClient) -> None:
    for model in ("nothing", "with/slash"):
        response = client.get(f"/v1/models/{model}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert f"'{model}'; loaded: drawn, guided" in response.json()["error"]["message"]


def test_mesh_model_shows_its_resolutions_and_no_fields_of_images(client: TestClient) -> None:
    model = client.get("/v1/models/ball").json()
    assert (model["modality"], model["quality_metric"]) == ("mesh", "volume_iou")
    assert model["octree_resolutions"] == {"multiple_of": 8, "minimum": 16, "maximum": 64}
    assert model["defaults"] == {"octree_resolution": 32, "num_inference_steps": 4, "guidance_scale": 3.5}
    assert "sizes" not in model
    assert "prompt_characters" not in model["limits"]
