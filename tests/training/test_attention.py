import torch
from torch.nn import functional as F

from training.attention import attend


def test_attention_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, tokens, 8, generator=generator) for tokens in (5, 7, 7))
    torch.testing.assert_close(attend(query, key, value), F.scaled_dot_product_attention(query, key, value))
