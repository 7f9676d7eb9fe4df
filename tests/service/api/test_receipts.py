"""What receipts say of exactness."""

from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.api.views import job_receipt_body
from tests.fixtures.job_records import RECEIPT

PROMPT = {"prompt": "a red circle"}


@pytest.mark.parametrize(
    ("budget", "exact"),
    [
        ({"preset": "exact"}, True),
        ({"quality": 1}, True),
        ({"compute_ratio": 1}, True),
        ({"preset": "fast"}, False),
        ({"latency_ms": 60_000}, False),
    ],
)
def test_receipt_says_whether_a_result_is_exact(client: TestClient, budget: dict[str, Any], exact: bool) -> None:
    """Not with a deadline, whose steps are shared with others even where there is time for all of them."""
    receipt = client.post("/v1/images", json={**PROMPT, "budget": budget}).json()["receipt"]
    assert receipt["exact"] is exact


@pytest.mark.parametrize(
    ("tolerances", "exact"),
    [
        ((0.0,), True),
        ((0.0, 0.0), True),
        ((0.0, 0.02), "within 0.02"),
        ((0.03, 0.02), "within 0.03"),
        ((0.0, None), False),
        ((None, 0.02), False),
    ],
)
def test_series_is_as_exact_as_its_least_exact_image(tolerances: tuple[float | None, ...], exact: bool | str) -> None:
    receipts = [
        replace(RECEIPT, summary=replace(RECEIPT.summary, exact_tolerance=tolerance)) for tolerance in tolerances
    ]
    assert job_receipt_body(receipts).exact == exact
