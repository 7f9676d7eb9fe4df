from typing import Any

import pytest


@pytest.fixture(scope="session", params=["flux_kontext"])
def kind(kind: Any) -> Any:
    """FLUX.1-Kontext alone."""
    return kind
