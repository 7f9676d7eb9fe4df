import pytest
import torch

from training import precision


@pytest.mark.parametrize(("is_fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_products_use_bfloat16_only_on_cpus_that_are_fast_at_it(
    is_fast: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "HAS_FAST_BFLOAT16", is_fast)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is expected
