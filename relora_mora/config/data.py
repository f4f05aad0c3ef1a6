"""The settings of data: where text comes from, what a row holds, and how rows become sequences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from relora_mora.config.types import LARGEST, LONGEST_SECONDS, Fraction, Positive, Seed, Strict, Text

Kind = Literal["messages", "alpaca", "sharegpt", "prompt", "question", "text"]
Score = Literal["answers", "all"]
TooLong = Literal["cut", "drop"]
Packing = Literal["stream", "whole", "none"]

# the fields of each kind, which are columns or keys of the same names unless data.records.columns says otherwise
FIELDS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "prompt": ("prompt", "completion"),
    "question": ("question", "answer"),
    "text": ("text",),
}
# fields that a row may lack
OPTIONAL_FIELDS: dict[Kind, tuple[str, ...]] = {
    "messages": ("tools",),
    "alpaca": ("input",),
    "sharegpt": ("system", "tools"),
}
CHATML = "chatml"  # the template that comes with the package
CONVERSATIONS: tuple[Kind, ...] = ("messages", "sharegpt")  # kinds that a chat template writes as text


class RecordsConfig(Strict):
    kind: Kind = Field(description="what a row holds: see docs/data.md")
    columns: dict[Text, Text] = Field({}, description="fields of the kind that have another key or column")
    template: Text | None = Field(
        None, description="of conversations: chatml, or a .jinja file; null: the tokenizer's chat template"
    )
    score: Score = Field("answers", description="tokens that count in the loss; of plain text all do")
    too_long: TooLong = Field(
        "cut", description="what happens to a record that is longer than a sequence: its end is cut, or it is dropped"
    )

    def __hash__(self) -> int:  # columns have none
        return hash(self.model_dump_json())

    @property
    def is_text(self) -> bool:
        """Rows of plain text, as there are where nothing is said of records."""
        return self.kind == "text"

    @property
    def is_conversation(self) -> bool:
        return self.kind in CONVERSATIONS

    @property
    def required(self) -> dict[str, str]:
        """Keys or columns by field: those that a row must have."""
        return {field: self.columns.get(field, field) for field in FIELDS[self.kind]}

    @property
    def optional(self) -> dict[str, str]:
        """Keys or columns by field: those that a row may lack."""
        return {field: self.columns.get(field, field) for field in OPTIONAL_FIELDS.get(self.kind, ())}


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


Split = Literal["train", "validation"]
SampleBy = Literal["line", "paragraph", "document"]


AtRevision = Annotated[str, Field(pattern="^[^@/ ]+/[^@/ ]+@[^ ]+$")]
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]


class DataConfig(Strict):
    """Sources are sets by name (``allenai/c4``), ``hub:REPO/PATTERN``, http(s) urls, local paths and globs.

    They hold JSON lines, text, CSV, Parquet or Arrow. A list of records (see ``data.train.N`` below) is a mixture,
    unless ``concatenate`` makes it one text; see docs/data.md.
    """

    train: Sources = Field(description="source or sources of training text; records are mixed by their weights")
    concatenate: bool = Field(
        False, description="read a list of records as one text, each source once an epoch, and mix by no weights"
    )
    stages: list[MixtureStage] = Field([], description="other weights of a mixture from some steps on")
    validation: SourcesOrSets = Field(
        description="source or sources of held-out text, or several sets of them by name, scored one by one"
    )
    revision: Text = Field(
        "main", description="revision of hub sources; resolved once to a commit, which is part of the fingerprint"
    )
    commits: dict[AtRevision, Commit] = Field(
        {}, description="what revisions are, as REPO@REVISION: COMMIT; a run notes here what it has read"
    )
    text_column: Text = Field(
        "text", description="the key of a JSON line, or the column, that holds the text; of sources that name none"
    )
    records: RecordsConfig | None = Field(
        None, description="what rows hold, of sources that do not say it themselves; null: plain text"
    )
    packing: Packing | None = Field(
        None,
        description="stream: rows one after the other, cut where a sequence ends; whole: whole rows, several in a "
        "sequence; none: one row in each; null: stream for text, whole for records",
    )
    sample_by: SampleBy = Field(
        "paragraph",
        description="what a document of a .txt file is: a line, a paragraph (blank lines around it) or the whole file",
    )
    sequence_length: Annotated[int, Field(ge=2, le=LARGEST)] = Field(
        512, description="tokens the model sees per sequence"
    )
    lanes: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        None, description="independent streams; null: the largest power of two <= 64 that divides train.batch_size"
    )
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        1, description="tokenizing worker processes per rank; 0: in the training process"
    )
    prefetch_batches: Annotated[int, Field(ge=1, le=10000)] = Field(
        4, description="global batches each worker prepares ahead"
    )
    shuffle_documents: Positive = Field(
        1024, description="documents per shuffled block of a lane; 1: in the order of the shard"
    )
    seed: Seed = Field(0, description="seed of shard order and document order")
    document_mask: bool = Field(False, description="attention does not cross document borders inside a sequence")
    max_line_bytes: Positive = Field(
        16 * 1024 * 1024, description="a longer line, document or row of text is counted as bad and skipped"
    )
    max_bad_fraction: Fraction = Field(
        0.01, description="stop when more than this fraction of a shard's lines or rows is bad"
    )
    timeout_seconds: Annotated[float, Field(gt=0, le=LONGEST_SECONDS, allow_inf_nan=False)] = Field(
        600.0, description="give up on a source that has failed for this long"
    )

    @property
    def is_mixture(self) -> bool:
        """Whether training text is drawn from several sources by weight."""
        return is_mixture(self.train) and not self.concatenate

    @property
    def train_sources(self) -> list[TextSource]:
        return as_sources(self.train)

    def records_of(self, source: TextSource) -> RecordsConfig | None:
        """What the rows of a source hold; None: plain text."""
        return source.records or self.records

    def packing_of(self, records: Iterable[RecordsConfig | None]) -> Packing:
        """How rows that hold these become sequences."""
        is_text = all(each is None or each.is_text for each in records)
        return self.packing or ("stream" if is_text else "whole")

    def has_whole_answers(self, records: RecordsConfig | None) -> bool:
        """Whether rows that hold these are answers behind prompts, and none is cut where a sequence ends."""
        if records is None or records.is_text or records.score == "all":
            return False
        return self.packing_of([records]) != "stream"

    @property
    def masks_documents(self) -> bool:
        """Whether attention in some sequences is told where documents begin."""
        return self.masks_documents_of([*self.train_sources, *self.sources("validation")])

    def masks_documents_of(self, sources: Iterable[TextSource]) -> bool:
        return self.document_mask or any(self.packing_of([self.records_of(each)]) == "whole" for each in sources)

    @property
    def validation_sets(self) -> dict[str, list[TextSource]]:
        """Sources by the name of their set; without names one set, called ""."""
        if isinstance(self.validation, dict):
            return {name: as_sources(sources) for name, sources in self.validation.items()}
        return {"": as_sources(self.validation)}

    def sources(self, split: Split) -> list[TextSource]:
        """All sources of the training or of the held-out text."""
        if split == "train":
            return self.train_sources
        return [source for sources in self.validation_sets.values() for source in sources]
