"""Reads plain text files: a document is a line, a paragraph or the whole file (``data.sample_by``)."""

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import Skipped, too_long
from relora_mora.data.formats.columns import decode_plain
from relora_mora.data.formats.json_lines import BLANK
from relora_mora.data.formats.turns import FromLines
from relora_mora.data.shard import Shard


class TextDocuments(FromLines[bytes | Skipped]):
    """The documents of a shard (see ``turns.Entries``), with ``\\n`` as the line end and none at the end of a document.

    Blank lines, which hold at most ASCII white space, separate paragraphs. ``max_line_bytes`` limits a document.
    """

    def __init__(self, shard: Shard, config: DataConfig) -> None:
        super().__init__(shard, config)
        self._sample_by = config.sample_by

    def content(self, entry: bytes | Skipped) -> str | Skipped:
        if isinstance(entry, Skipped):
            return entry
        text = decode_plain(entry)
        if isinstance(text, Skipped):
            return text
        text = text.removeprefix("\ufeff")
        return text if text.strip(BLANK) else Skipped("blank_line")

    def _next(self) -> bytes | Skipped | None:
        return self._line() if self._sample_by == "line" else self._joined_lines()

    def _line(self) -> bytes | Skipped | None:
        line = self._lines.take()
        return line.removesuffix(b"\r") if isinstance(line, bytes) else line

    def _joined_lines(self) -> bytes | Skipped | None:
        """The lines up to the end of the paragraph or file; None if there are none."""
        lines: list[bytes] = []
        size = -1  # with a newline between two lines
        while (line := self._line()) is not None:
            if self._sample_by == "paragraph" and isinstance(line, bytes) and not line.strip():
                if size >= 0:
                    break
                continue
            size += 1 + (len(line) if isinstance(line, bytes) else self._lines.taken_bytes)
            if isinstance(line, Skipped) or size > self._limit:
                lines.clear()  # only the length of the document is still needed
            else:
                lines.append(line)
        if size > self._limit:
            return too_long(size, self._limit)
        return b"\n".join(lines) if size >= 0 else None
