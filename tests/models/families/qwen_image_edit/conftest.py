from typing import Any

import pytest


@pytest.fixture(scope="session", params=["qwen_image_edit", "qwen_image_edit_plus"])
def kind(kind: Any) -> Any:
    """Qwen-Image-Edit and its Plus."""
    return kind
