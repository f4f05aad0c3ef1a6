"""The settings of data: where text comes from, what a row holds, and how rows become sequences."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator
from pydantic_core import PydanticCustomError

from relora_mora.config.types import LARGEST, FilePath, Fraction, Free, OfText, Positive, Seconds, Seed, Strict, Text

Kind = Literal["messages", "alpaca", "sharegpt", "prompt", "question", "text"]
Score = Literal["answers", "all"]
TooLong = Literal["cut", "drop"]
Packing = Literal["stream", "whole", "none"]

# The fields of each kind, read from columns or keys of the same names unless data.records.columns maps them to others.
_FIELDS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "prompt": ("prompt", "completion"),
    "question": ("question", "answer"),
    "text": ("text",),
}
# fields that a row may lack
_OPTIONAL_FIELDS: dict[Kind, tuple[str, ...]] = {
    "messages": ("tools",),
    "alpaca": ("input",),
    "sharegpt": ("system", "tools"),
}
CHATML = "chatml"  # the template that comes with the package
CONVERSATIONS: tuple[Kind, ...] = ("messages", "sharegpt")  # kinds that a chat template writes as text


class RecordsConfig(Strict):
    kind: Kind
    """what a row holds: see docs/data.md"""
    columns: dict[Text, Text] = Field({})
    """key or column of each field whose name differs from the field's"""
    template: FilePath | None = None
    """chat template of conversations: chatml or a .jinja file; null: the tokenizer's"""
    score: Score = "answers"
    """which tokens count in the loss; in plain text all do"""
    too_long: TooLong = "cut"
    """for a record longer than a sequence: cut its end off, or drop the record"""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if unknown := [field for field in self.columns if field not in self.fields]:
            message = "columns should name fields of {kind}: {fields}; not {unknown}"
            names = {"kind": self.kind, "fields": ", ".join(self.fields), "unknown": ", ".join(unknown)}
            raise PydanticCustomError("columns", message, names)
        if self.template is not None and not self.is_conversation:
            raise PydanticCustomError("template", "a template is only for messages and sharegpt; leave it out")
        return self

    def __hash__(self) -> int:  # a dict such as columns has no hash
        return hash(self.model_dump_json())

    @property
    def is_text(self) -> bool:
        """Whether rows are plain text, which is the default without a setting for records."""
        return self.kind == "text"

    @property
    def is_conversation(self) -> bool:
        return self.kind in CONVERSATIONS

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)

    @property
    def required(self) -> dict[str, str]:
        """Key or column of each field that a row must have."""
        return {field: self.columns.get(field, field) for field in _FIELDS[self.kind]}

    @property
    def optional(self) -> dict[str, str]:
        """Key or column of each field that a row may lack."""
        return {field: self.columns.get(field, field) for field in _OPTIONAL_FIELDS.get(self.kind, ())}


Name = Annotated[str, Field(pattern=r"^[\w.-]{0,64}$")]  # in metrics
Weight = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


class TextSource(Strict):
    """A source of text with settings of its own."""

    source: Text
    """a named set, hub:REPO/PATTERN, a url (http(s)://, s3:// and others), a local path or glob"""
    config: Text | None = None
    """configuration of a named set; null: its default"""
    split: Text | None = None
    """split of a named set; null: train or validation, as the setting"""
    revision: Text | None = None
    """revision of a source on the hub; null: data.revision"""
    data_files: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """pattern or patterns of the files to read from a named set; null: the files of the split"""
    text_column: Text | None = None
    """key or column of its text; null: data.text_column"""
    records: RecordsConfig | None = None
    """what its rows hold; null: data.records"""
    name: Name | None = None
    """name in metrics; null: the last part of source"""
    weight: Weight = 1.0
    """share of the tokens, relative to the mixture's other weights"""

    @model_validator(mode="after")
    def _names_each_part_once(self) -> Self:
        is_set = "://" not in self.source and not self.source.startswith("hub:")
        named = zip(self.source.split(":")[1:], (self.config, self.split), strict=False)
        if is_set and any(part and given is not None for part, given in named):
            raise PydanticCustomError("source", "the source names its config or split, too; give each only once")
        return self

    @property
    def label(self) -> str:
        """``name``, or the last part of the source that is not a pattern, without suffixes; "" if there is none."""
        if self.name is not None:
            return self.name
        parts = self.source.partition("?")[0].removeprefix("hub:").split(":")[-1 if "://" in self.source else 0]
        plain = [part for part in parts.split("/") if part and not set(part) & set("*?[]{}~")]
        last = re.sub(r"(\.(jsonl?|parquet|txt|csv|arrow|gz|zst))+$", "", plain[-1]) if plain else ""
        return re.sub(r"[^\w.-]", "_", last)[:64].strip(".")


class MixtureStage(Strict):
    """Weights that a mixture has from some step on."""

    from_step: Positive
    """the first optimizer step with these weights; steps count from 1"""
    weights: dict[Name, Weight] = Field(min_length=1)
    """the weight of every source in data.train, by name"""


def _as_records(value: Any) -> Any:
    """A list of records, whichever form a setting has. Texts without any record are one text: their name is ""."""
    is_single = isinstance(value, str | TextSource) or (isinstance(value, Mapping) and "source" in value)
    items = [value] if is_single else value
    if not isinstance(items, list):
        raise PydanticCustomError(
            "sources",
            "input should be a source, or a list of sources or of records such as "
            "{source: ..., weight: 0.7, name: web}",
        )
    if any(isinstance(item, Mapping) and item.get("name") == "" for item in items):
        raise PydanticCustomError("name", "the name of a source should not be empty")
    text = {} if any(isinstance(item, TextSource | Mapping) for item in items) else {"name": ""}
    return [{"source": item, **text} if isinstance(item, str) else item for item in items]


def _as_sets(value: Any) -> Any:
    return value if isinstance(value, Mapping) and "source" not in value else {"": value}


def _as_given(sources: list[TextSource]) -> Any:
    """The shortest form of a setting: a text, a list of texts, or a list of records."""
    if is_mixture(sources):
        return [source.model_dump() for source in sources]
    texts = [source.source for source in sources]
    return texts[0] if len(texts) == 1 else texts


def _sets_as_given(sets: dict[str, list[TextSource]]) -> Any:
    given = {name: _as_given(sources) for name, sources in sets.items()}
    return given[""] if list(given) == [""] else given


# all forms of sources become lists of records when they are read, and the shortest form when they are written
# held-out text without names is one set, called ""
_Given = str | list[str] | list[TextSource]
Sources = Annotated[
    list[TextSource],
    Field(min_length=1),
    BeforeValidator(_as_records, json_schema_input_type=_Given),
    PlainSerializer(_as_given),
]
Sets = Annotated[
    dict[Name, Sources],
    Field(min_length=1),
    BeforeValidator(_as_sets, json_schema_input_type=_Given | dict[Name, _Given]),
    PlainSerializer(_sets_as_given),
]


def as_sources(sources: str | Sequence[str | TextSource]) -> list[TextSource]:
    """Every source as a record, whichever form the setting has."""
    given = sources if isinstance(sources, str) else [*sources]
    return [TextSource.model_validate(item) for item in _as_records(given)]


def is_mixture(sources: Iterable[TextSource]) -> bool:
    """Whether sources are mixed by weight: records are; texts without any record count as one source."""
    return any(source.name != "" for source in sources)


def set_setting(name: str) -> str:
    """The setting of a held-out set, for messages; ``name`` is "" if the setting has a single set without a name."""
    return f"data.validation.{name}" if name else "data.validation"


Split = Literal["train", "validation"]
SampleBy = Literal["line", "paragraph", "document"]


AtRevision = Annotated[str, Field(pattern="^[^@/ ]+/[^@/ ]+@[^ ]+$")]
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]


class DataConfig(Strict):
    """Sources are named sets (``allenai/c4``), ``hub:REPO/PATTERN``, http(s) urls, local paths and globs.

    They hold JSON lines, text, CSV, Parquet or Arrow. A list of records (see ``data.train.N`` below) is a mixture,
    unless ``concatenate`` makes it one text; see docs/data.md.
    """

    train: OfText[Sources]
    """source or sources of training text; records are mixed by their weights"""
    concatenate: bool = False
    """read a list of records as one text, each source once per epoch, instead of mixing by weight"""
    stages: list[MixtureStage] = Field([])
    """new weights for the mixture, from given steps on"""
    validation: Free[Sets]
    """source or sources of held-out text, or several held-out sets by name, each scored separately"""
    revision: OfText[Text] = "main"
    """revision of hub sources; resolved once to a commit, which is part of the fingerprint"""
    commits: OfText[dict[AtRevision, Commit]] = Field({})
    """the commit of each revision, as REPO@REVISION: COMMIT; a run records here what it has read"""
    text_column: OfText[Text] = "text"
    """key of a JSON line, or column, that holds the text, for sources that do not set their own"""
    records: OfText[RecordsConfig | None] = None
    """what rows hold, for sources that do not set their own; null: plain text"""
    packing: OfText[Packing | None] = None
    """stream: rows follow each other and are cut at the end of a sequence; whole: several whole rows per sequence;
    none: one row per sequence; null: stream for text, whole for records"""
    sample_by: OfText[SampleBy] = "paragraph"
    """what one document of a .txt file is: a line, a paragraph (between blank lines) or the whole file"""
    sequence_length: Annotated[int, Field(ge=2, le=LARGEST)] = 512
    """tokens per sequence that the model sees"""
    lanes: Annotated[int, Field(ge=1, le=65536)] | None = None
    """independent data streams; null: the largest power of two <= 64 dividing train.batch_size"""
    workers: Free[Annotated[int, Field(ge=0, le=1024)]] = 1
    """tokenizing worker processes per rank; 0: tokenize in the training process"""
    prefetch_batches: Free[Annotated[int, Field(ge=1, le=10000)]] = 4
    """global batches that each worker prepares in advance"""
    shuffle_documents: Positive = 1024
    """documents per shuffled block of a lane; 1: keep the shard's order"""
    seed: Seed = 0
    """seed of the order of shards and documents"""
    document_mask: bool = False
    """keep attention within each document of a sequence"""
    max_line_bytes: Positive = 16 * 1024 * 1024
    """a longer line, document or row of text counts as bad and is skipped"""
    max_bad_fraction: Free[Fraction] = 0.01
    """stop if a larger fraction of a shard's lines or rows is bad; fewer than 1,000 count as 1,000"""
    timeout_seconds: Free[Seconds] = 600.0
    """give up on a source that has failed for this long"""

    @property
    def is_mixture(self) -> bool:
        """Whether training text is drawn from several sources by weight."""
        return is_mixture(self.train) and not self.concatenate

    def records_of(self, source: TextSource) -> RecordsConfig | None:
        """What the rows of a source hold; None means plain text."""
        return source.records or self.records

    def packing_of(self, records: Iterable[RecordsConfig | None]) -> Packing:
        """How rows with these contents are packed into sequences."""
        is_text = all(each is None or each.is_text for each in records)
        return self.packing or ("stream" if is_text else "whole")

    def has_whole_answers(self, records: RecordsConfig | None) -> bool:
        """Whether only the answers in these rows are scored, and none is cut at the end of a sequence."""
        if records is None or records.is_text or records.score == "all":
            return False
        return self.packing_of([records]) != "stream"

    @property
    def masks_documents(self) -> bool:
        """Whether some sequences mask attention between documents."""
        return self.masks_documents_of([*self.train, *self.sources("validation")])

    def masks_documents_of(self, sources: Iterable[TextSource]) -> bool:
        return self.document_mask or any(self.packing_of([self.records_of(each)]) == "whole" for each in sources)

    def sources(self, split: Split) -> list[TextSource]:
        """All sources of the training text or of the held-out text."""
        if split == "train":
            return self.train
        return [source for sources in self.validation.values() for source in sources]
