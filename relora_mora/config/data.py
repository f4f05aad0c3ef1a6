"""Data as settings: where the text is, how rows become sequences, and in which order they come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from relora_mora.config.records import Packing, RecordsConfig
from relora_mora.config.sources import (
    MixtureStage,
    Sources,
    SourcesOrSets,
    TextSource,
    as_sources,
    is_mixture,
)
from relora_mora.config.types import LARGEST, LONGEST_SECONDS, Fraction, Positive, Seed, Strict, Text

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
