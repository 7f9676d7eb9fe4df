from typing import TypedDict, Unpack

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training import attention
from training.attention import attend, use_matrix_products
from training.scenes.backbones import build_flux


class Options(TypedDict, total=False):
    """Arguments of `attend` beside query, key and value."""

    attn_mask: Tensor
    is_causal: bool
    scale: float
    enable_gqa: bool


@pytest.mark.parametrize(
    "options",
    [{}, {"attn_mask": torch.ones(5, 7).tril().bool()}, {"is_causal": True}, {"scale": 0.1}, {"enable_gqa": True}],
    ids=str,
)
def test_attention_equals_that_of_torch(options: Options) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, tokens, 8, generator=generator) for tokens in (5, 7, 7))
    if "enable_gqa" in options:
        key, value = key[:, :2], value[:, :2]
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attend(query, key, value, **options), expected)


def test_models_of_diffusers_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = build_flux()
    generator = torch.Generator().manual_seed(0)
    for parameter in transformer.parameters():  # its gates start at zero
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    channels = transformer.config.in_channels
    inputs = {
        "hidden_states": torch.randn(1, 6, channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, 3, transformer.config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(1, transformer.config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.arange(18.0).view(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    with torch.no_grad():
        expected = transformer(**inputs).sample
        num_calls = 0

        def counted(query: Tensor, key: Tensor, value: Tensor, **options: Unpack[Options]) -> Tensor:
            nonlocal num_calls
            num_calls += 1
            return attend(query, key, value, **options)

        monkeypatch.setattr(attention, "attend", counted)
        monkeypatch.setattr(attention, "HAS_FAST_BFLOAT16", True)
        monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)  # so that it is restored
        use_matrix_products()
        actual = transformer(**inputs).sample
    assert num_calls == len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
