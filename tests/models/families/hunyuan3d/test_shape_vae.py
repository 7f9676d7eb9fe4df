"""The shape VAE at small sizes: its forms, its names, what it may be asked."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.errors import WeightsError
from models.families.hunyuan3d.shape_vae import ShapeVAE, fourier_features, geometry_of

PLAIN: dict[str, Any] = {}
TURBO: dict[str, Any] = {
    "geo_decoder_mlp_expand_ratio": 1,
    "geo_decoder_downsample_ratio": 2,
    "geo_decoder_ln_post": False,
}
NUM_LATENTS = 6


def build(**params: Any) -> ShapeVAE:
    """Published settings but for the sizes; random weights, those of norms too."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_latents": NUM_LATENTS,
        "embed_dim": 4,
        "width": 32,
        "heads": 4,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "point_feats": 4,
        "include_pi": False,
        "qkv_bias": False,
        "qk_norm": True,
    }
    vae = ShapeVAE(**sizes | params)
    for weight in vae.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return vae.eval().requires_grad_(False)


@pytest.fixture(params=[PLAIN, TURBO], ids=["plain", "turbo"])
def vae(request: pytest.FixtureRequest) -> ShapeVAE:
    return build(**request.param)


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(3, NUM_LATENTS, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def surface() -> Tensor:
    return 2 * torch.rand(3, 40, 7, generator=torch.Generator().manual_seed(2)) - 1


@pytest.fixture
def points(surface: Tensor) -> Tensor:
    return surface[..., :3]


@pytest.mark.parametrize(
    ("params", "num_tensors", "num_parameters"),
    # What Hunyuan3D-2.1's and 2.0's files hold.
    [
        ({"num_latents": 4096, "num_encoder_layers": 8}, 410, 327_746_177),
        ({"num_latents": 3072, "with_encoder": False}, None, 214_212_865),
    ],
    ids=["2.1", "2.0"],
)
def test_published_sizes_make_the_published_numbers_of_tensors_and_parameters(
    params: dict[str, Any], num_tensors: int | None, num_parameters: int
) -> None:
    with torch.device("meta"):
        vae = ShapeVAE(
            **params,
            embed_dim=64,
            width=1024,
            heads=16,
            num_decoder_layers=16,
            include_pi=False,
            qkv_bias=False,
            qk_norm=True,
            point_feats=4,
        )
    assert sum(tensor.numel() for tensor in vae.state_dict().values()) == num_parameters
    assert num_tensors in (None, len(vae.state_dict()))


@pytest.mark.parametrize("with_encoder", [True, False])
@pytest.mark.parametrize("form", [PLAIN, TURBO], ids=["plain", "turbo"])
def test_sizes_are_determined_by_the_tensors_alone(form: dict[str, Any], with_encoder: bool) -> None:
    tensors = build(**form, with_encoder=with_encoder).state_dict()
    again = build(**geometry_of(tensors))
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }


def test_turbo_has_a_narrow_decoder_without_norms_of_heads() -> None:
    tensors = build(**TURBO).state_dict()
    decoder = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("geo_decoder.")}
    assert decoder["geo_decoder.latents_proj.weight"] == (16, 32)
    assert decoder["geo_decoder.query_proj.weight"] == (16, 51)
    assert decoder["geo_decoder.cross_attn_decoder.mlp.c_fc.weight"] == (16, 16)
    assert not any("q_norm" in name or "k_norm" in name or "ln_post" in name for name in decoder)
    assert "transformer.resblocks.0.attn.attention.q_norm.weight" in tensors


def test_published_epsilons_are_larger_in_the_norms_after_encoder_and_geometry_decoder() -> None:
    epsilons = {name: module.eps for name, module in build().named_modules() if isinstance(module, torch.nn.LayerNorm)}
    larger = {"encoder.ln_post", "geo_decoder.ln_post"}
    assert epsilons == {name: 1e-5 if name in larger else 1e-6 for name in epsilons}
    assert epsilons.keys() > larger


def test_tensors_of_something_else_are_refused_by_the_name_that_is_missing() -> None:
    with pytest.raises(WeightsError, match=r"post_kl\.weight is missing"):
        geometry_of({"x_embedder.weight": torch.zeros(1)})


@pytest.mark.parametrize(("include_pi", "unit"), [(False, 1.0), (True, math.pi)])
def test_fourier_features_go_place_sines_cosines_each_axis_by_axis(include_pi: bool, unit: float) -> None:
    x, y, z = 0.3, -0.7, 0.9
    features = fourier_features(torch.tensor([x, y, z]), 2, include_pi)
    angles = [axis * unit * frequency for axis in (x, y, z) for frequency in (1, 2)]
    expected = [x, y, z, *map(math.sin, angles), *map(math.cos, angles)]
    torch.testing.assert_close(features, torch.tensor(expected))


def test_places_reach_the_features_unrounded_in_a_half_precision_model(latents: Tensor, points: Tensor) -> None:
    vae = build().bfloat16()
    seen: list[Tensor] = []
    vae.geo_decoder.query_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    assert vae.field(latents)(points).dtype is torch.float32
    assert torch.equal(seen[0], fourier_features(points, 8, include_pi=False).bfloat16())


def test_points_in_chunks_have_the_same_logits(vae: ShapeVAE, latents: Tensor, points: Tensor) -> None:
    field = vae.field(latents)
    chunks = torch.cat([field(chunk) for chunk in points.split(7, dim=1)], dim=1)
    torch.testing.assert_close(chunks, field(points))


def test_shapes_of_a_batch_are_decoded_as_alone(vae: ShapeVAE, latents: Tensor, points: Tensor) -> None:
    together = vae.field(latents)(points)
    for number, logits in enumerate(together):
        alone = vae.field(latents[number : number + 1])
        torch.testing.assert_close(alone(points[number]), logits)
        torch.testing.assert_close(alone(points[number : number + 1]), logits[None])


def test_points_without_a_batch_are_refused_for_several_shapes(vae: ShapeVAE, latents: Tensor, points: Tensor) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        vae.field(latents)(points[0])


def test_latents_have_no_order(vae: ShapeVAE, latents: Tensor, points: Tensor) -> None:
    order = torch.randperm(NUM_LATENTS, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(vae.decode(latents[:, order]), vae.decode(latents)[:, order])
    torch.testing.assert_close(vae.field(latents[:, order])(points), vae.field(latents)(points))


def test_each_shape_and_place_has_a_logit_of_its_own(vae: ShapeVAE, latents: Tensor, points: Tensor) -> None:
    logits = vae.field(latents)(points[:1].expand(3, -1, -1))
    assert (logits.std(0) > 1e-3).all()
    assert (logits.std(1) > 1e-3).all()


def test_encoder_has_an_order_of_queries_but_none_of_data(surface: Tensor) -> None:
    vae = build()
    features = vae.features(surface)
    queries, order = features[:, :NUM_LATENTS], torch.randperm(NUM_LATENTS, generator=torch.Generator().manual_seed(3))
    mean, _ = vae.encode(queries, features)
    assert mean.shape == (3, NUM_LATENTS, 4)
    torch.testing.assert_close(vae.encode(queries[:, order], features)[0], mean[:, order])
    torch.testing.assert_close(vae.encode(queries, features.flip(1))[0], mean)


def test_log_variance_stays_within_its_limits(surface: Tensor) -> None:
    vae = build()
    vae.pre_kl.bias[4:] = torch.tensor([-1e3, 1e3, 0.0, 0.0])
    features = vae.features(surface)
    mean, logvar = vae.encode(features[:, :NUM_LATENTS], features)
    assert (logvar[..., 0] == -30).all()
    assert (logvar[..., 1] == 20).all()
    assert logvar[..., 2:].std() > 0
    assert mean.std() > 0


def test_vae_without_encoder_says_so_when_it_should_encode(surface: Tensor) -> None:
    vae = build(with_encoder=False)
    features = vae.features(surface)
    with pytest.raises(WeightsError, match="has no encoder"):
        vae.encode(features[:, :NUM_LATENTS], features)


def test_scale_factor_is_left_to_the_caller(latents: Tensor, points: Tensor) -> None:
    one, other = build(scale_factor=1.0), build(scale_factor=2.0)
    assert other.scale_factor == 2.0
    assert torch.equal(one.field(latents)(points), other.field(latents)(points))


def gradients_of(vae: ShapeVAE, surface: Tensor, points: Tensor) -> dict[str, Tensor]:
    """Of the way from a surface over a sample of the latents to the field, what reaches each parameter."""
    features = vae.features(surface)
    mean, logvar = vae.encode(features[:, :NUM_LATENTS], features)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
    logits = vae.field(mean + noise * (0.5 * logvar).exp())(points)
    assert logits.dtype is torch.float32
    names, weights = zip(*vae.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(logits.square().mean(), weights), strict=True))


def test_all_weights_learn_under_bfloat16_autocast(vae: ShapeVAE, surface: Tensor, points: Tensor) -> None:
    vae.requires_grad_()
    exact = gradients_of(vae, surface, points)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients_of(vae, surface, points)
    assert exact.keys() == rounded.keys() == dict(vae.named_parameters()).keys()
    for name, gradient in rounded.items():
        # It adds the same to a query's product with every key, which softmax takes away: its gradient is rounding.
        if not name.endswith("k_norm.bias"):
            assert torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.99, name
