"""Types of the fields of requests: JSON's own, nothing turned into another, numbers finite."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]  # else a million wrong items make a million messages


class Strict(BaseModel):
    """Part of a request. `true` is no number, `"5"` neither."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def _whole(value: Any) -> Any:
    """JSON has one kind of numbers: 64.0 is 64."""
    return int(value) if type(value) is float and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1)]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**63)]
Share = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Repetition = Annotated[float, Field(ge=0.01, le=10)]  # scores are divided by it, in float32
