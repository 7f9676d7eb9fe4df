"""The tiny model of each kind, its routers, and the engines that serve it."""

import pytest

from tests.fixtures.engines import bfloat16_engine, engine, family, forecast_table, open_engine, plain_engine
from tests.fixtures.generation import ask, bfloat16_stock, denoise, edited, guided, other_scale, stock, stock_result
from tests.fixtures.kinds import directory, kind, model, streams_of
from tests.fixtures.tiny_editing import (
    small_pictures,
    tiny_flux_kontext,
    tiny_qwen_image_edit,
    tiny_qwen_image_edit_2511,
    tiny_qwen_image_edit_plus,
)
from tests.fixtures.tiny_flux import tiny_flux, tiny_schnell
from tests.fixtures.tiny_hunyuan3d import tiny_plain_hunyuan3d, tiny_stream_hunyuan3d
from tests.fixtures.tiny_qwen_image import tiny_qwen_image
from tests.fixtures.tiny_routers import router_weights

__all__ = [
    "ask",
    "bfloat16_engine",
    "bfloat16_stock",
    "denoise",
    "directory",
    "edited",
    "engine",
    "family",
    "forecast_table",
    "guided",
    "kind",
    "model",
    "open_engine",
    "other_scale",
    "plain_engine",
    "router_weights",
    "small_pictures",
    "stock",
    "stock_result",
    "streams_of",
    "tiny_flux",
    "tiny_flux_kontext",
    "tiny_plain_hunyuan3d",
    "tiny_qwen_image",
    "tiny_qwen_image_edit",
    "tiny_qwen_image_edit_2511",
    "tiny_qwen_image_edit_plus",
    "tiny_schnell",
    "tiny_stream_hunyuan3d",
]

_SIBLINGS = ("qwen_image_edit", "qwen_image_edit_2511", "hunyuan3d_plain")
"""Kinds that share most of their code with another one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave siblings to `make test`, but for their exactness and their own folders."""
    for item in items:
        call = getattr(item, "callspec", None)
        kind = call.params.get("kind") if call else None
        if kind not in _SIBLINGS or item.path.name == "test_exact.py":
            continue
        if not {kind, kind.rsplit("_", 1)[0]} & {*item.path.parts}:
            item.add_marker("long")
