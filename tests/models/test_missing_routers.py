"""Loading a model that has no router folder."""

import logging
from pathlib import Path

import pytest

from models.zoo import load_engine

ROOT = Path(__file__).parents[2]


def test_missing_router_folder_is_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="models"):
        engine = load_engine([ROOT / "checkpoints" / "tiny-flux"], device="cpu", router_weights=tmp_path)
    assert [point.preset for point in engine.cards["tiny-flux"].curve] == ["exact"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"tiny-flux has no router folder {tmp_path / 'tiny-flux'}" in record.getMessage()
