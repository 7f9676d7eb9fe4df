from typing import Any

import pytest


@pytest.fixture(scope="session", params=["qwen_image_edit", "qwen_image_edit_plus", "qwen_image_edit_2511"])
def kind(kind: Any) -> Any:
    """Qwen-Image-Edit, 2509 and 2511."""
    return kind
