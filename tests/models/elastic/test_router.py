import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.elastic.plan import MLP_WIDTHS
from models.elastic.router import Router, RouterStack

CHANNELS, HIDDEN = 12, 8


@pytest.fixture
def router() -> Router:
    torch.manual_seed(0)
    router = Router(CHANNELS, HIDDEN)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router.requires_grad_(False)


@pytest.fixture
def streams() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(3, 5, CHANNELS, generator=rng), torch.randn(3, 7, CHANNELS, generator=rng)


@pytest.fixture
def temb() -> Tensor:
    return torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(2))


def test_scores_equal_the_official_formulation(router: Router, streams: tuple[Tensor, Tensor], temb: Tensor) -> None:
    """Heads on every token, then the mean (Elastic-DiT at ce39f1d); ours takes the mean first."""
    weight, bias = (router.get_parameter(f"img_mod.1.{name}") for name in ("weight", "bias"))
    shift, scale = (F.silu(temb) @ weight.T + bias).chunk(2, dim=1)
    tokens = torch.cat(streams, dim=1)
    deviation = tokens - tokens.mean(2, keepdim=True)
    normed = deviation / (deviation.square().mean(2, keepdim=True) + 1e-6).sqrt()
    trunk = router.out[0](normed * (1 + scale[:, None]) + shift[:, None]).clamp(min=0)
    scores = router(streams, router.modulation(temb), (None, None))
    torch.testing.assert_close(scores.depth_logits, router.out[2](trunk).mean(1)[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.width_logits, router.width_head(trunk).mean(1), rtol=1e-5, atol=1e-5)


def test_padding_never_counts(router: Router, streams: tuple[Tensor, Tensor], temb: Tensor) -> None:
    lengths = (2, 5, 3)
    text, image = streams
    mask = torch.arange(text.shape[1]) < torch.tensor(lengths)[:, None]
    padded = torch.where(mask[..., None], text, 1e4)
    scores = router((padded, image), router.modulation(temb), (mask, None))
    for i, length in enumerate(lengths):
        row = slice(i, i + 1)
        alone = router((text[row, :length], image[row]), router.modulation(temb[row]), (None, None))
        torch.testing.assert_close(scores.depth_logits[row], alone.depth_logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scores.width_logits[row], alone.width_logits, rtol=1e-5, atol=1e-5)


def test_mask_of_real_tokens_equals_no_mask(router: Router, streams: tuple[Tensor, Tensor], temb: Tensor) -> None:
    modulation = router.modulation(temb)
    masks = tuple(torch.ones(stream.shape[:2], dtype=torch.bool) for stream in streams)
    masked, unmasked = router(streams, modulation, masks), router(streams, modulation, (None, None))
    torch.testing.assert_close(masked.depth_logits, unmasked.depth_logits)
    torch.testing.assert_close(masked.width_logits, unmasked.width_logits)


def test_each_row_is_scored_by_itself(router: Router, streams: tuple[Tensor, Tensor], temb: Tensor) -> None:
    scores = router(streams, router.modulation(temb), (None, None))
    for i in range(3):
        row = slice(i, i + 1)
        alone = router([stream[row] for stream in streams], router.modulation(temb[row]), (None, None))
        torch.testing.assert_close(scores.depth_logits[row], alone.depth_logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scores.width_logits[row], alone.width_logits, rtol=1e-5, atol=1e-5)


def test_every_token_and_the_time_embedding_move_the_scores(
    router: Router, streams: tuple[Tensor, Tensor], temb: Tensor
) -> None:
    def depth_logits(text: Tensor, image: Tensor, temb: Tensor) -> Tensor:
        logits: Tensor = router((text, image), router.modulation(temb), (None, None)).depth_logits
        return logits

    text, image = streams
    before = depth_logits(text, image, temb)
    assert not torch.equal(depth_logits(text.index_fill(1, torch.tensor(4), 0), image, temb), before)
    assert not torch.equal(depth_logits(text, image.index_fill(1, torch.tensor(0), 0), temb), before)
    assert not torch.equal(depth_logits(text, image, temb + 1), before)


def test_new_routers_let_blocks_run_near_full_width(streams: tuple[Tensor, Tensor], temb: Tensor) -> None:
    torch.manual_seed(0)
    router = Router(CHANNELS, HIDDEN).requires_grad_(False)
    scores = router(streams, router.modulation(temb), (None, None))
    torch.testing.assert_close(scores.depth_logits.sigmoid(), torch.full([3], 0.7), rtol=0, atol=0.005)
    widths = torch.tensor([0.096, 0.096, 0.096, 0.711]).expand(3, -1)
    torch.testing.assert_close(scores.width_logits.softmax(1), widths, rtol=0, atol=0.005)


def test_modulation_of_a_new_router_is_the_identity(temb: Tensor) -> None:
    assert torch.equal(Router(CHANNELS, HIDDEN).modulation(temb), torch.zeros(3, 2 * CHANNELS))


def test_stack_has_the_official_names_and_shapes() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in RouterStack(2, CHANNELS, HIDDEN).state_dict().items()}
    official = {
        "img_mod.1.weight": (2 * CHANNELS, CHANNELS),  # officially 3 * CHANNELS, the last third without effect
        "img_mod.1.bias": (2 * CHANNELS,),
        "out.0.weight": (HIDDEN, CHANNELS),
        "out.0.bias": (HIDDEN,),
        "out.2.weight": (1, HIDDEN),
        "out.2.bias": (1,),
        "width_head.weight": (len(MLP_WIDTHS), HIDDEN),
        "width_head.bias": (len(MLP_WIDTHS),),
    }
    assert shapes == {f"gate_mlps.{i}.{name}": shape for i in range(2) for name, shape in official.items()}


@pytest.mark.parametrize("num_real_tokens", [None, 2])
def test_fused_router_gives_the_same_scores_from_the_same_memory(
    router: Router, streams: tuple[Tensor, Tensor], temb: Tensor, num_real_tokens: int | None
) -> None:
    text, _ = streams
    mask = None if num_real_tokens is None else (torch.arange(text.shape[1]) < num_real_tokens).expand(3, -1)
    inputs = streams, router.modulation(temb), (mask, None)
    before = router(*inputs)
    fused = router.fused()
    torch.testing.assert_close(fused(*inputs).logits, before.logits, rtol=1e-5, atol=1e-5)
    router.gate_head.bias.add_(1)
    torch.testing.assert_close(fused(*inputs).depth_logits, before.depth_logits + 1, rtol=1e-5, atol=1e-5)


def test_fused_modulation_is_that_of_each_router(temb: Tensor) -> None:
    stack = RouterStack(2, CHANNELS, HIDDEN)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)
    modulations = stack.fused_modulation()(F.silu(temb)).chunk(2, dim=1)
    for router, modulation in zip(stack.gate_mlps, modulations, strict=True):
        assert isinstance(router, Router)
        torch.testing.assert_close(modulation, router.modulation(temb))


def test_fused_modulation_takes_no_second_memory() -> None:
    stack = RouterStack(3, CHANNELS, HIDDEN)
    names = list(stack.state_dict())
    fused = stack.fused_modulation()
    for router in stack.routers:
        layer = router.modulation_layer
        assert layer.weight.untyped_storage().data_ptr() == fused.weight.untyped_storage().data_ptr()
        assert layer.bias.untyped_storage().data_ptr() == fused.bias.untyped_storage().data_ptr()
    assert list(stack.state_dict()) == names
