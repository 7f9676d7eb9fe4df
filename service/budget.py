"""The budget as clients, settings and the command line write it."""

from difflib import get_close_matches
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from models.curve import Preset
from models.request import Budget, ComputeBudget, LatencyBudget, PresetBudget, QualityBudget

_FORMS = ("preset", "quality", "compute_ratio", "latency_ms")

# A name is compared up to this length, and taken for a slip of one that is as like it as guidance is to guidance_scale.
_MAX_NAME, _MIN_LIKENESS = 60, 0.7

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class ClosedBody(BaseModel):
    """A body that refuses the first field that it does not know, and names the nearest one that it does.

    pydantic alone collects them all, however many.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_field(cls, fields: Any) -> Any:
        for name in fields if isinstance(fields, dict) else ():
            if name not in cls.model_fields:
                near = get_close_matches(name[:_MAX_NAME], cls.model_fields, n=1, cutoff=_MIN_LIKENESS)
                error = PydanticCustomError("unknown_field", "unknown field", {"nearest": near[0] if near else None})
                unknown = InitErrorDetails(type=error, loc=(name,), input=fields[name])
                raise ValidationError.from_exception_data(cls.__name__, [unknown])
        return fields


class BudgetBody(ClosedBody):
    """Speed against quality: exactly one of `preset`, `quality`, `compute_ratio` and `latency_ms`."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": [form]} for form in _FORMS]}, frozen=True)

    preset: Preset | None = Field(
        default=None, description="A named point of the model's calibration curve, see /v1/models."
    )
    quality: Number | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The cheapest point of the curve with at least this calibrated quality: the similarity to the "
        "exact result that nine of ten samples reach. 1 is exact.",
    )
    compute_ratio: Number | None = Field(
        default=None, gt=0, le=1, description="At most this share of the dense model's block compute."
    )
    latency_ms: Number | None = Field(
        default=None,
        gt=0,
        le=86_400_000,
        description="The highest quality that is ready this many milliseconds after the request's arrival. Requests "
        "with deadlines that run at once leave time for each other.",
    )
    min_quality: Number | None = Field(
        default=None,
        ge=0,
        le=1,
        description="With latency_ms, the lowest quality that will do, 0 by default. With the others, how far the "
        "server may lower quality under load to shorten the wait; without it, it never does.",
    )

    @model_validator(mode="after")
    def _check_forms(self) -> Self:
        given = [form for form in _FORMS if getattr(self, form) is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "budget_form",
                "a budget is exactly one of preset, quality, compute_ratio and latency_ms; this one has {given}",
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
        if self.compute_ratio is not None:
            return ComputeBudget(self.compute_ratio)
        assert self.latency_ms is not None, "a BudgetBody has one form"
        return LatencyBudget(self.latency_ms / 1000, self.min_quality or 0.0)


def budget_fields(text: str) -> dict[str, Any]:
    """A budget's fields from the command line's short form, such as `fast`, `quality=0.9` or `latency_ms=800`.

    They are still to be validated as a BudgetBody.
    """
    name, equals, value = text.partition("=")
    if not equals:
        return {"preset": text}
    try:
        return {name: float(value)}
    except ValueError:
        return {name: value}
