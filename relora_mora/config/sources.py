"""Where text comes from, as settings: sources, mixtures of them by weight, and sets of held-out text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from relora_mora.config.records import RecordsConfig
from relora_mora.config.types import Positive, Strict, Text

_NAME = re.compile(r"[\w.-]{1,64}")


def _check_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise PydanticCustomError("name", "input should be a name of letters, digits, '_', '-' and '.', for metrics")
    return text


Name = Annotated[str, AfterValidator(_check_name)]
Weight = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


class TextSource(Strict):
    """A source of text with what belongs to it alone."""

    source: Text = Field(description="a set by name, hub:REPO/PATTERN, an http(s) url, a local path or glob")
    config: Text | None = Field(None, description="configuration of a set by name; null: its default")
    split: Text | None = Field(None, description="split of a set by name; null: train or validation, as the setting")
    revision: Text | None = Field(None, description="revision of a source on the hub; null: data.revision")
    data_files: Text | Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="pattern or patterns of the files to read of a set by name; null: those of the split"
    )
    text_column: Text | None = Field(None, description="null: data.text_column")
    records: RecordsConfig | None = Field(None, description="what its rows hold; null: data.records")
    name: Name | None = Field(None, description="for metrics; null: the last part of the source's own name")
    weight: Weight = Field(1.0, description="share of the tokens, relative to the other weights of the mixture")
    max_epochs: Positive | None = Field(None, description="the most times to read it; null: any number")
    at_max_epochs: Literal["stop", "warn"] = Field("stop", description="what happens before it is read once more")

    @property
    def label(self) -> str:
        """Its name, or the last part of the source that is no pattern, without suffixes; "" where there is none."""
        if self.name is not None:
            return self.name
        parts = self.source.partition("?")[0].removeprefix("hub:").split(":")[-1 if "://" in self.source else 0]
        plain = [part for part in parts.split("/") if part and not set(part) & set("*?[]{}~")]
        last = re.sub(r"(\.(jsonl?|parquet|txt|csv|arrow|gz|zst))+$", "", plain[-1]) if plain else ""
        return re.sub(r"[^\w.-]", "_", last)[:64].strip(".")


class MixtureStage(Strict):
    """From a step on, a mixture has other weights."""

    from_step: Positive = Field(description="the first optimizer step with these weights, from 1")
    weights: dict[Name, Weight] = Field(min_length=1, description="the weight of every source of data.train by name")


def _is_record(value: Any) -> bool:
    return isinstance(value, TextSource) or (isinstance(value, Mapping) and "source" in value)


def _normal(value: Any) -> Any:
    """A record alone is a list of one, and a text among records is a record."""
    items = [value] if _is_record(value) else value
    if not isinstance(items, list) or not any(isinstance(item, TextSource | Mapping) for item in items):
        return items
    return [{"source": item} if isinstance(item, str) else item for item in items]


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "sets"
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return "none of them"
    return "sources" if any(isinstance(item, TextSource | Mapping) for item in value) else "texts"


# tags of the members of unions: they stand in pydantic's locations and mean nothing to a user
TAGS = {"text", "texts", "sources", "sets"}
_Text = Annotated[Text, Tag("text")]
_Texts = Annotated[list[Text], Field(min_length=1), Tag("texts")]
_Records = Annotated[list[TextSource], Field(min_length=1), Tag("sources")]
_ONE_OF = Discriminator(
    _kind,
    custom_error_type="sources",
    custom_error_message="Input should be a source, or a list of sources or of records such as "
    "{source: ..., weight: 0.7, name: web}",
)
Sources = Annotated[_Text | _Texts | _Records, _ONE_OF, BeforeValidator(_normal)]
_Sets = Annotated[dict[Name, Sources], Field(min_length=1), Tag("sets")]
SourcesOrSets = Annotated[_Text | _Texts | _Records | _Sets, _ONE_OF, BeforeValidator(_normal)]


def as_sources(given: str | Sequence[str | TextSource]) -> list[TextSource]:
    """Each source as a record, whatever form it was given in."""
    items = [given] if isinstance(given, str) else given
    return [item if isinstance(item, TextSource) else TextSource(source=item) for item in items]


def is_mixture(given: object) -> bool:
    """Whether sources are drawn from by weight: those that are records are; texts alone are one source."""
    return isinstance(given, Sequence) and any(isinstance(item, TextSource) for item in given)


Given = str | list[str] | list[TextSource] | dict[str, str | list[str] | list[TextSource]]


def map_records(given: Given, change: Callable[[TextSource], TextSource]) -> Given:
    """The same sources with each record changed; texts stay what they are."""
    if isinstance(given, dict):
        return {name: map_records(sources, change) for name, sources in given.items()}  # type: ignore[misc]
    if isinstance(given, list):
        return [change(item) if isinstance(item, TextSource) else item for item in given]  # type: ignore[return-value]
    return given


def set_setting(name: str) -> str:
    """How messages call a set of held-out text; "" is the name of the only one of a setting without names."""
    return f"data.validation.{name}" if name else "data.validation"
