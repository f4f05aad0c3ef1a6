"""What a folder of tokens made in advance says of itself: of which text they are, made by which tokenizer, how many.

The folder holds a file of tokens for each shard of the text, in the same order, and ``tokens.json``, the index.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from relora_mora.config.data import SampleBy
from relora_mora.config.types import Strict
from relora_mora.data.errors import SourceError, unreadable
from relora_mora.system.files import write_synced

INDEX = "tokens.json"
COMMAND = "python launch/tokenize_text.py"


class TokenizationSpec(Strict):
    """What decides the tokens of a text."""

    tokenizer: str  # its fingerprint
    eos: int
    max_line_bytes: int  # longer rows are skipped
    sample_by: SampleBy | None = None  # of .txt files; None where there are none


class SourceText(Strict):
    """A shard of text as it was when its tokens were made: what a run that reads the text compares at a resume."""

    name: str
    size: int | None
    text_column: str
    origin: Literal["local", "server", "hub"]
    content: str  # see content.content_digests


class FileStats(Strict):
    """What is in a file of tokens."""

    rows: int
    documents: int  # rows that are not skipped
    bad: int
    tokens: int  # with an EOS for each document: what a lane makes of the file
    utf8_bytes: int  # of the documents
    digest: str  # of samples of the file


class TokenFile(Strict):
    """A file of tokens, finished."""

    making: TokenizationSpec
    text: SourceText
    totals: FileStats


class Index(Strict):
    """``files`` is None until all of them are written."""

    version: Literal[1] = 1
    making: TokenizationSpec
    texts: list[SourceText]
    files: list[FileStats] | None = None

    def token_files(self) -> list[TokenFile]:
        return [
            TokenFile(making=self.making, text=text, totals=totals)
            for text, totals in zip(self.texts, self.files or [], strict=True)
        ]


def is_token_folder(folder: str | Path) -> bool:
    """Whether tokens were made there: its index has their making, or is damaged, beside a file of tokens."""
    index = Path(folder, INDEX)
    if not os.path.isfile(index):  # noqa: PTH113 - Path.is_file raises for a long name
        return False
    try:
        with index.open("rb") as stream:
            return b'"making"' in stream.read(4096) or file_in(Path(folder), 0).is_file()
    except OSError:  # who reads it says why
        return True


def file_in(folder: Path, number: int) -> Path:
    """The tokens of the shard with this number in the list of shards."""
    return folder / f"{number:05d}.arrow"


def read_index(folder: Path) -> Index:
    """Raises SourceError for an index that is damaged."""
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


def finished_index(folder: Path) -> Index:
    """The index of a folder that can be read. Raises SourceError for one that is damaged or not finished."""
    index = read_index(folder)
    if index.files is None:
        raise SourceError(
            f"{folder}: its tokens are not finished; start {COMMAND} again, as before, and it goes on where it was"
        )
    if len(index.files) != len(index.texts):
        raise SourceError(
            f"{folder / INDEX} is damaged ({len(index.files)} files of {len(index.texts)} shards); "
            f"remove {folder} and make its tokens again: {COMMAND}"
        )
    return index


def write_index(folder: Path, index: Index) -> None:
    write_synced(folder / INDEX, index.model_dump_json(indent=1) + "\n")


def total_of(files: Sequence[FileStats]) -> FileStats:
    """Of all files together; without a digest."""
    counts = {name: sum(getattr(file, name) for file in files) for name in FileStats.model_fields if name != "digest"}
    return FileStats(**counts, digest="")
