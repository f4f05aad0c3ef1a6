"""Building blocks of settings: strings and numbers with limits, models that refuse unknown keys, and rules."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from relora_mora.config.shipped import exists
from relora_mora.system.files import from_home


class Fault(NamedTuple):
    """A faulty combination. ``settings``: all settings involved, first the one to change. ``text``: the message."""

    settings: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.settings[0]}: {self.text}"


class Rule(NamedTuple):
    """A combination of settings that cannot work.

    ``settings`` names all settings involved, first the one to change. ``broken`` gets the settings and returns what is
    wrong with them, or something false. ``says`` is the message, in which ``{found}`` is what ``broken`` returned and
    ``{c}`` are the settings.
    """

    settings: str
    broken: Callable[[Any], Any]
    says: str


def broken_rules(rules: Iterable[Rule], settings: Any) -> Iterator[Fault]:
    """A fault for each rule that ``settings`` break."""
    for rule in rules:
        if found := rule.broken(settings):
            shown = ", ".join(map(str, found)) if isinstance(found, list) else found
            yield Fault(tuple(rule.settings.split()), rule.says.format(found=shown, c=settings))


LARGEST = 2**53  # the largest whole number of any setting: up to here float64 is exact
LONGEST_SECONDS = 1e9  # the timers of all libraries can wait this long


def as_whole(value: Any) -> Any:
    """Turns a float such as 5e8 into the int that it equals."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def find_path(value: str, info: ValidationInfo) -> str:
    """A path as it can be opened: below the home folder, or next to the settings file if it exists only there."""
    value = from_home(value)
    folder = (info.context or {}).get("folder")
    next_to_file = "" if folder is None or exists(Path(value)) else str(folder / value)
    return next_to_file if next_to_file and exists(Path(next_to_file)) else value


Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]  # no file name can have NUL
HomePath = Annotated[Text, AfterValidator(from_home)]
FilePath = Annotated[Text, AfterValidator(find_path)]
Project = Annotated[str, Field(pattern=r"^([\w.-]+/)?[\w.-]{1,128}$")]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=1, le=LARGEST), BeforeValidator(as_whole)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(gt=0, le=LONGEST_SECONDS, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, lt=10, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


@dataclass(frozen=True)
class Resume:
    """Whether a setting may differ at a resume. Without it, train.allow_changes must name the setting.

    free: yes, it changes no result, or only rounding, or the content that it names is compared. data: as free, and it
    decides which text is read and what its rows are, which is compared by a fingerprint. fixed: no.
    """

    change: Literal["free", "data", "fixed"]


T = TypeVar("T")
Free = Annotated[T, Resume("free")]
OfText = Annotated[T, Resume("data")]
Fixed = Annotated[T, Resume("fixed")]


class Strict(BaseModel):
    """Refuses unknown keys and wrong types. The text below a setting is its description."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **given: Any) -> None:
        super().__pydantic_init_subclass__(**given)
        for field in cls.model_fields.values():
            field.description = field.description and " ".join(field.description.split())
