"""Number formats for training on CPUs."""

import torch

HAS_FAST_BFLOAT16: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether this CPU multiplies bfloat16 faster than float32. A CPU with AVX2 alone is about 60 times slower at it."""


def autocast() -> torch.autocast:
    """Matrix products in bfloat16 on CPUs with fast bfloat16, in float32 on all others."""
    return torch.autocast("cpu", torch.bfloat16, enabled=HAS_FAST_BFLOAT16)
