"""The index of a folder of tokens: which text or records it was made from, by which tokenizer, and how many tokens.

The folder holds a file of tokens for each shard of the text, in the same order, and ``tokens.json``, the index.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import ValidationError, model_validator

from relora_mora.config.data import SampleBy
from relora_mora.config.types import Strict
from relora_mora.data.errors import SourceError, unreadable

INDEX = "tokens.json"
COMMAND = "relora-mora tokenize"


class TokenizationSpec(Strict):
    """Everything that decides the tokens of a text or of records."""

    tokenizer: str  # its fingerprint
    eos: int
    max_line_bytes: int  # longer rows are skipped
    sample_by: SampleBy | None = None  # how .txt files are cut; None if there are none
    records: str | None = None  # see encoders.records_digest; None: plain text
    ends: list[list[int]] | None = None  # tokens before and after a whole record; None: EOS on both sides


class SourceText(Strict):
    """A shard of text as it was when it was tokenized."""

    name: str
    size: int | None
    text_column: str
    origin: Literal["local", "server", "hub"]
    content: str  # see content.contents


class FileStats(Strict):
    """The totals of a file of tokens, or of all."""

    rows: int
    documents: int  # rows that are not skipped
    bad: int
    tokens: int  # with an EOS for each document, as a lane reads the file
    utf8_bytes: int  # of the documents
    digest: str  # of samples of the file


class TokenFile(Strict):
    """A finished file of tokens."""

    making: TokenizationSpec
    text: SourceText
    totals: FileStats


class Index(Strict):
    """``files`` is None until all of them are written."""

    version: Literal[1] = 1
    making: TokenizationSpec
    texts: list[SourceText]
    files: list[FileStats] | None = None

    @model_validator(mode="after")
    def _check_count(self) -> "Index":
        if self.files is not None and len(self.files) != len(self.texts):
            raise ValueError(f"{len(self.files)} files of {len(self.texts)} shards")
        return self


def is_token_folder(folder: str | Path) -> bool:
    """Whether a folder has an index, finished or not."""
    return os.path.isfile(Path(folder, INDEX))  # noqa: PTH113 - Path.is_file raises for a long or a closed name


def file_in(folder: Path, number: int) -> Path:
    """The tokens of the shard with this number in the list of shards."""
    return folder / f"{number:05d}.arrow"


def read_index(folder: Path) -> Index:
    """Raises SourceError for a damaged index."""
    path = folder / INDEX
    try:
        return Index.model_validate_json(path.read_bytes())
    except OSError as error:
        raise unreadable(str(path), error, "check the path and its permissions") from error
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise SourceError(
            f"{path} is damaged, or of another version ({place}{': ' if place else ''}{fault['msg']}); "
            f"remove {folder} and make its tokens again: {COMMAND}"
        ) from None


def finished_files(folder: Path) -> list[TokenFile]:
    """The files of a finished folder. Raises SourceError if the folder is damaged or not finished."""
    index = read_index(folder)
    if index.files is None:
        raise SourceError(
            f"{folder}: its tokens are not finished; run {COMMAND} again with the same arguments, and it continues"
        )
    return [
        TokenFile(making=index.making, text=text, totals=totals)
        for text, totals in zip(index.texts, index.files, strict=True)
    ]
