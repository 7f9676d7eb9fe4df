from typing import Any

import pytest


@pytest.fixture(scope="session", params=["qwen_image"])
def kind(kind: Any) -> Any:
    """Qwen-Image alone."""
    return kind
