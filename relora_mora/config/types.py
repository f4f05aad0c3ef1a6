"""The building blocks of settings: strings and numbers with limits, and models that refuse unknown keys."""

from __future__ import annotations

import re
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Fault(NamedTuple):
    """``settings``: every setting that the judgement rests on, the one to change first. ``text``: the message."""

    settings: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.settings[0]}: {self.text}"


LARGEST = 2**53  # of any whole number: up to here float64 counts exactly
LONGEST_SECONDS = 1e9  # what clocks and timers of all libraries can wait for


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul", "input should hold no NUL, which no name of a file has")
    return text


def _project(text: str) -> str:
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]{1,128}", text):
        raise PydanticCustomError("project", "input should be PROJECT or ENTITY/PROJECT, of letters, digits, - _ and .")
    return text


def as_whole(value: Any) -> Any:
    """5e8 is a whole number too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]
Project = Annotated[Text, AfterValidator(_project)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=1, le=LARGEST), BeforeValidator(as_whole)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(gt=0, lt=10, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
