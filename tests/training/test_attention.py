from typing import Any

import pytest
import torch
from torch.nn import functional as F

from training import attention
from training.attention import attend, use_matrix_products
from training.scenes.backbones import build_flux


@pytest.mark.parametrize(
    "options",
    [{}, {"attn_mask": torch.ones(5, 7).tril().bool()}, {"is_causal": True}, {"scale": 0.1}, {"enable_gqa": True}],
    ids=str,
)
def test_attention_is_that_of_torch(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, tokens, 8, generator=generator) for tokens in (5, 7, 7))
    if "enable_gqa" in options:
        key, value = key[:, :2], value[:, :2]
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attend(query, key, value, **options), expected)


def test_models_of_diffusers_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = build_flux()
    generator = torch.Generator().manual_seed(0)
    for parameter in transformer.parameters():  # it begins with gates that let nothing through
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
        calls: list[int] = []
        monkeypatch.setattr(attention, "attend", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
        monkeypatch.setattr(attention, "HAS_FAST_BFLOAT16", True)
        monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)  # to be put back
        use_matrix_products()
        actual = transformer(**inputs).sample
    assert len(calls) == len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
