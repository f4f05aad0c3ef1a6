"""The index of a folder of tokens: which text or records it was made from, by which tokenizer, and how many tokens.

The folder holds a file of tokens for each shard of the text, in the same order, and ``tokens.json``, the index.
"""

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
    """The totals of a file of tokens."""

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

    def token_files(self) -> list[TokenFile]:
        return [
            TokenFile(making=self.making, text=text, totals=totals)
            for text, totals in zip(self.texts, self.files or [], strict=True)
        ]


def is_token_folder(folder: str | Path) -> bool:
    """Whether this is a folder of tokens: its index has a spec, or is damaged and lies next to a file of tokens."""
    index = Path(folder, INDEX)
    if not os.path.isfile(index):  # noqa: PTH113 - Path.is_file raises for a long name
        return False
    try:
        with index.open("rb") as stream:
            return b'"making"' in stream.read(4096) or file_in(Path(folder), 0).is_file()
    except OSError:  # read_index will report the reason
        return True


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


def finished_index(folder: Path) -> Index:
    """The index of a finished folder. Raises SourceError if the folder is damaged or not finished."""
    index = read_index(folder)
    if index.files is None:
        raise SourceError(
            f"{folder}: its tokens are not finished; run {COMMAND} again with the same arguments, and it continues"
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
    """The sums over all files, without a digest."""
    counts = {name: sum(getattr(file, name) for file in files) for name in FileStats.model_fields if name != "digest"}
    return FileStats(**counts, digest="")
