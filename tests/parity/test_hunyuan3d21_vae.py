"""`hunyuan3d21_vae`: the shape VAE's decoder, field and encoder, and the grids and the mesh of its field."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from skimage.measure import marching_cubes
from torch import Tensor, nn

from models.families.hunyuan3d.shape_vae import DecodedField, ShapeVAE, geometry_of

# Five times tighter than for other recordings: a wrong norm epsilon, 1e-6 or 1e-5, changes results by less than 1e-4.
NEAR: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def recording(recorded: Callable[[str], Any]) -> Any:
    return recorded("hunyuan3d21_vae")


@pytest.fixture(scope="module")
def vae(recording: Any) -> ShapeVAE:
    accepted = inspect.signature(ShapeVAE).parameters
    config = {key: value for key, value in recording.settings["config"].items() if key in accepted}
    vae = ShapeVAE(**config | {"with_encoder": "pre_kl.weight" in recording.weights})
    vae.load_state_dict(recording.weights)
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def field(recording: Any, vae: ShapeVAE) -> DecodedField:
    """The field of the recorded pipeline latents."""
    return vae.field(recording.tensors["in/pipeline_latents"] / vae.scale_factor)


@pytest.fixture(scope="module")
def computed(recording: Any, vae: ShapeVAE) -> dict[str, Tensor]:
    """The results of one pass, under the names of the recording."""
    block = vae.geo_decoder.cross_attn_decoder
    watched: dict[str, nn.Module] = {
        "post_kl": vae.post_kl,
        **{f"transformer.{number}": module for number, module in enumerate(vae.transformer.resblocks)},
        "decoded": vae.transformer,
        "query_proj": vae.geo_decoder.query_proj,
        "geo_attn": block.attn,
        "geo_cross_attn": block,
        "geo_ln_post": vae.geo_decoder.ln_post,
    }
    if vae.encoder is not None:
        watched |= {"enc_cross_attn": vae.encoder.cross_attn, "enc_features": vae.encoder}
    computed: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda _module, _inputs, output: computed.update({name: output}))

    handles = [watch(name, module) for name, module in watched.items()]
    computed["logits"] = vae.field(recording.tensors["in/latents"])(recording.tensors["in/points"])[..., None]
    if vae.encoder is not None:
        query, data = (vae.features(recording.tensors[f"in/enc_{name}_points"]) for name in ("query", "data"))
        computed["enc_mean"], computed["enc_logvar"] = vae.encode(query, data)
    for handle in handles:
        handle.remove()
    return computed


# Outputs with a test of their own: grids, mesh, and the Fourier features, which are sensitive to rounding.
APART = {"grid_logits", "mesh_vertices", "mesh_faces", "hier_grid_logits", "flash_grid_logits", "fourier"}


def test_every_recorded_intermediate_is_as_recorded(recording: Any, computed: dict[str, Tensor]) -> None:
    expected = {key.removeprefix("out/"): value for key, value in recording.tensors.items() if key.startswith("out/")}
    assert expected.keys() >= {"post_kl", "transformer.0", "decoded", "query_proj", "geo_attn", "geo_cross_attn"}
    for name in expected.keys() - APART:
        torch.testing.assert_close(computed[name], expected[name], **NEAR, msg=partial("{}: {}".format, name))


def test_fourier_features_are_as_recorded(recording: Any, vae: ShapeVAE) -> None:
    # The highest frequency multiplies the rounding error of a position.
    num_freqs = (vae.geo_decoder.query_proj.in_features // 3 - 1) // 2
    near = {"atol": NEAR["atol"] + 2**num_freqs * torch.finfo(torch.float32).eps, "rtol": NEAR["rtol"]}
    torch.testing.assert_close(vae.features(recording.tensors["in/points"]), recording.tensors["out/fourier"], **near)
    for name in ("query", "data") if vae.encoder is not None else ():
        features = vae.features(recording.tensors[f"in/enc_{name}_points"])
        torch.testing.assert_close(features, recording.tensors[f"in/enc_{name}"], **near)


def test_geometry_decoder_settings_follow_from_the_recorded_weights(recording: Any) -> None:
    geometry = geometry_of(recording.weights)
    config = recording.settings["config"]
    assert geometry == {**geometry, **{name: config[name] for name in geometry.keys() & config.keys()}}
    assert geometry["with_encoder"] == any(name.startswith("encoder.") for name in recording.weights)


def settings_of(recording: Any, grid: str) -> Any:
    """How `grid` was decoded. Skips the test if the recording lacks this grid."""
    if grid not in recording.settings:
        pytest.skip(f"the recording has no {grid}")
    return recording.settings[grid]


def grid_points(side: int, bounds: float) -> Tensor:
    """Points `(side, side, side, 3)`; x varies slowest."""
    axis = torch.linspace(-bounds, bounds, side)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)


@pytest.fixture(scope="module")
def grid_logits(recording: Any, field: DecodedField) -> Tensor:
    settings = settings_of(recording, "grid")
    points = grid_points(settings["octree_resolution"] + 1, settings["bounds"])
    flat = torch.cat([field(chunk) for chunk in points.view(-1, 3).split(settings["num_chunks"])])
    return flat.view(points.shape[:3])


def test_dense_grid_is_as_recorded(recording: Any, grid_logits: Tensor) -> None:
    torch.testing.assert_close(grid_logits, recording.tensors["out/grid_logits"][0], **NEAR)


def test_mesh_of_our_grid_is_as_recorded(recording: Any, grid_logits: Tensor) -> None:
    settings = settings_of(recording, "grid")
    vertices, faces, _, _ = marching_cubes(grid_logits.numpy(), settings["mc_level"])
    # As in the official program; dividing by the number of cells would be exact.
    spacing = 2 * settings["bounds"] / (settings["octree_resolution"] + 1)
    ours = torch.from_numpy(vertices.copy()) * spacing - settings["bounds"]
    # An error of the grid moves a vertex along its edge, by the error over the change of the field along that edge.
    error = (grid_logits - recording.tensors["out/grid_logits"][0]).abs().max().item()
    change = smallest_change_over_a_crossed_edge(grid_logits - settings["mc_level"])
    near = {"atol": 1e-6 + 2 * spacing * error / change, "rtol": 0}
    assert near["atol"] < spacing / 20
    torch.testing.assert_close(ours, recording.tensors["out/mesh_vertices"], **near)
    reversed_faces = torch.from_numpy(faces.copy()).flip(1).long()
    assert torch.equal(reversed_faces, recording.tensors["out/mesh_faces"])


def smallest_change_over_a_crossed_edge(logits: Tensor) -> float:
    smallest = torch.inf
    for dim in range(3):
        low, high = (logits.narrow(dim, start, logits.shape[dim] - 1) for start in (0, 1))
        crossed = (low > 0) != (high > 0)
        smallest = min(smallest, (low - high).abs()[crossed].min().item())
    return smallest


def test_field_has_the_recorded_values_at_coarse_to_fine_points(recording: Any, field: DecodedField) -> None:
    settings = settings_of(recording, "hier")
    expected = recording.tensors["out/hier_grid_logits"][0]
    visited = ~expected.isnan()
    assert visited.any()
    points = grid_points(len(expected), settings["bounds"])
    torch.testing.assert_close(field(points[visited]), expected[visited], **NEAR)


def test_flashvdm_equals_our_field_on_its_choice_of_latents(recording: Any, vae: ShapeVAE) -> None:
    """FlashVDM (not offered here) lets an attention head see a third of the latents, chosen for each block of points.

    With that choice, our geometry decoder gives FlashVDM's values. So FlashVDM approximates our field.
    """
    settings, decoder = settings_of(recording, "flash"), vae.geo_decoder
    block, attention = decoder.cross_attn_decoder, decoder.cross_attn_decoder.attn
    latents = recording.tensors["in/pipeline_latents"] / vae.scale_factor
    keys, values = decoder.keys_and_values(vae.decode(latents))
    # FlashVDM keeps a third for any number of latents but the published 3072 and 512.
    num_latents = keys.shape[2]
    assert num_latents not in (3072, 512)
    expected = recording.tensors["out/flash_grid_logits"][0]
    assert settings["topk_mode"] == "mean"
    features = vae.features(grid_points(len(expected), settings["bounds"]))
    size = len(expected) // settings["mini_grid_num"]

    def blocks(grid: Tensor) -> list[Tensor]:
        return [cube for plane in grid.split(size) for row in plane.split(size, 1) for cube in row.split(size, 2)]

    for cube, logits in zip(blocks(features), blocks(expected), strict=True):
        points = cube.reshape(1, -1, cube.shape[-1])
        queries = attention.c_q(block.ln_1(decoder.query_proj(points[:, ::100])))
        queries = attention.attention.q_norm(queries.unflatten(-1, (keys.shape[1], -1))).transpose(1, 2)
        kept = (queries @ keys.mT).mean(2).topk(num_latents // 3).indices[..., None].expand(-1, -1, -1, keys.shape[3])
        ours = decoder(points, keys.gather(2, kept), values.gather(2, kept))
        torch.testing.assert_close(ours.view(logits.shape), logits, **NEAR)


def test_permuting_latents_does_not_change_the_field(recording: Any, vae: ShapeVAE) -> None:
    latents, points = recording.tensors["in/latents"], recording.tensors["in/points"]
    order = torch.randperm(latents.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.field(latents[:, order])(points), recording.tensors["out/logits"][..., 0], **NEAR)
    torch.testing.assert_close(vae.decode(latents[:, order]), recording.tensors["out/decoded"][:, order], **NEAR)
