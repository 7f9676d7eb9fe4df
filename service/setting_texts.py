"""Settings that are a text of several values, in a variable of the environment or on the command line."""

import json
from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import BeforeValidator, ValidationInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

T = TypeVar("T")


def refusal(message: str) -> PydanticCustomError:
    """An error whose message names the setting itself."""
    return PydanticCustomError("unsupported", "{message}", {"message": message})


def _split_at_commas(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _split_pairs(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str) or value.lstrip().startswith("{"):
        return json.loads(value) if isinstance(value, str) else value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if wrong := next((name for name, equals, _ in pairs if not equals), None):
        form = "name=file" if info.field_name == "loras" else "pattern=model"
        raise refusal(f"{info.field_name} has '{wrong.strip()}', which is not {form}")
    return {name.strip(): meant.strip() for name, _, meant in pairs}


SeveralOf = Annotated[tuple[T, ...], NoDecode, BeforeValidator(_split_at_commas)]
"""Separated by commas."""
Pairs = Annotated[Mapping[str, str], NoDecode, BeforeValidator(_split_pairs)]
"""As name=value separated by commas, or as JSON."""
