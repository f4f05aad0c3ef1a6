"""The formats of text: their file names, and how lanes share a file. ``file_rows`` has a reader for each."""

from dataclasses import dataclass
from pathlib import PurePosixPath

COMPRESSED = (".gz", ".zst", ".zstd")


@dataclass(frozen=True)
class Format:
    """A format of text. A file in groups needs random access, so it is never compressed as a whole."""

    name: str
    suffixes: tuple[str, ...]
    unit: str | None  # the word for a row in messages; None: the value of data.sample_by
    in_groups: bool = False  # lanes that share a file split its groups of rows; otherwise they take its rows in turn
    endings: tuple[bytes, ...] = ()  # every complete file ends in one of these


JSON_LINES = Format("JSON lines", (".json", ".jsonl", ".ndjson"), "line")
TEXT = Format("text", (".txt",), None)
CSV = Format("CSV", (".csv",), "row")
PARQUET = Format("Parquet", (".parquet",), "row", in_groups=True, endings=(b"PAR1",))
ARROW = Format("Arrow", (".arrow",), "row", in_groups=True, endings=(b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"))

FORMATS = (JSON_LINES, TEXT, CSV, PARQUET, ARROW)
SUFFIXES = (*(suffix for format in FORMATS for suffix in format.suffixes), *COMPRESSED)


def format_of(path: str) -> Format | None:
    """The format that the suffix of a file's name stands for, in any case; None for other suffixes.

    A compressed file without another suffix, such as ``a.gz``, holds JSON lines.
    """
    path = path.lower()
    suffix = PurePosixPath(path).suffix
    compressed = suffix in COMPRESSED
    if compressed:
        suffix = PurePosixPath(path).with_suffix("").suffix
    for format in FORMATS:
        if suffix in format.suffixes:
            return None if compressed and format.in_groups else format
    return JSON_LINES if compressed else None
