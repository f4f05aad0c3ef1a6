"""Records as settings: what a row of training text holds, and which of its tokens are learned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from relora_mora.config.types import Strict, Text

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
