from typing import Any

import pytest


@pytest.fixture(scope="session", params=["flux"])
def kind(kind: Any) -> Any:
    """FLUX alone."""
    return kind
