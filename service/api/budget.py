"""The budget, as bodies, settings and the command line write it."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from models.request import Budget, ComputeBudget, Preset, PresetBudget, QualityBudget

_FORMS = ("preset", "quality", "compute_ratio")

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


def _refuse_latency(value: object) -> None:
    if value is not None:
        raise PydanticCustomError(
            "unsupported", "this server does not serve latency budgets; use quality or compute_ratio"
        )


class BudgetBody(BaseModel):
    """Speed against quality: exactly one of `preset`, `quality` and `compute_ratio`."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"oneOf": [{"required": [form]} for form in _FORMS]}, frozen=True
    )

    preset: Preset | None = Field(
        default=None, description="A named point of the model's calibration curve, see /v1/models."
    )
    quality: Number | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The cheapest thresholds whose calibrated quality is at least this; 1 is exact.",
    )
    compute_ratio: Number | None = Field(
        default=None, gt=0, le=1, description="At most this share of the dense model's block compute."
    )
    min_quality: Number | None = Field(
        default=None,
        ge=0,
        le=1,
        description="A floor under any lowering of quality. This server never lowers it under load.",
    )
    latency_ms: SkipJsonSchema[Annotated[None, BeforeValidator(_refuse_latency)]] = None

    @model_validator(mode="after")
    def _check_forms(self) -> Self:
        given = [form for form in _FORMS if getattr(self, form) is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "budget_form",
                "a budget is exactly one of preset, quality and compute_ratio; this one has {given}",
                {"given": " and ".join(given) or "none"},
            )
        if self.quality is not None and self.min_quality is not None and self.min_quality > self.quality:
            raise PydanticCustomError(
                "budget_floor",
                "min_quality {floor} is above the quality {quality} that is asked for; it can be at most that",
                {"floor": self.min_quality, "quality": self.quality},
            )
        return self

    def to_budget(self) -> Budget:
        if self.preset is not None:
            return PresetBudget(self.preset)
        if self.quality is not None:
            return QualityBudget(self.quality)
        assert self.compute_ratio is not None, "a BudgetBody has one form"
        return ComputeBudget(self.compute_ratio)


def budget_fields(text: str) -> dict[str, Any]:
    """A budget's fields from the command line's short form: `fast`, `quality=0.9` or `compute_ratio=0.5`.

    They are still to be validated as a BudgetBody.
    """
    name, equals, value = text.partition("=")
    if not equals:
        return {"preset": text}
    try:
        return {name: float(value)}
    except ValueError:
        return {name: value}
