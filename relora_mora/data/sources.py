"""Resolves sources of text into an ordered list of shards."""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from relora_mora.config.data import DataConfig, Split, TextSource, as_sources, is_mixture
from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.named_sets import commit_of, expand_braces, files_in, hub_files, set_name
from relora_mora.data.network import hub_shard
from relora_mora.data.shard import ARROW, SUFFIXES, TEXT, RecordFormat, Shard, format_of, version_on_disk
from relora_mora.data.tokens.index import COMMAND, file_in, finished_files, is_token_folder
from relora_mora.system.files import from_home
from relora_mora.system.logs import counted


def shards_of(sources: str | Sequence[str | TextSource], config: DataConfig, split: Split) -> list[Shard]:
    """The shards of all sources, in the given order; the files of a glob are sorted by path.

    A source is ``allenai/c4`` (config ``en``, the files of ``split``), a set ``OWNER/NAME[:CONFIG[:SPLIT]]`` on the hub
    or ``FOLDER[:CONFIG[:SPLIT]]``, ``hub:OWNER/NAME/PATTERN``, an http(s) url, a url of a store of fsspec, a local path
    or a local glob, or a pre-tokenized folder. ``{00000..01023}`` in paths, urls and hub patterns stands for a range of
    numbers. ``config`` has the values of whatever a source does not set. Hub sources are read at the commit of their
    revision in ``config.commits``, or else at its current commit. Raises SourceError if a source names no file or a
    file that was named before, and for files that cannot hold such records.
    """
    listed = as_sources(sources)
    mixed = split == "train" and is_mixture(listed)
    shards: dict[str, Shard] = {}  # by the file
    for source in listed:
        settings = config.records_of(source)
        records = RecordFormat.of(settings)
        column = source.text_column or (settings.columns.get("text") if settings else None) or config.text_column
        name = source.label if mixed or source.text_column or source.records else ""
        count = len(shards)
        for found in _resolve(source, split, config):
            shard = replace(found, text_column=column, records=records, source=name)
            _check_format(shard, source.source)
            file = shard.location if shard.is_remote else os.path.realpath(shard.location)
            if file in shards:
                raise SourceError(f"{source.source}: {shard.name} is named already; give each file once")
            shards[file] = shard
        if len(shards) == count:
            raise SourceError(
                f"no file matches {source.source} (from {Path.cwd()}); check the path or hub:OWNER/NAME/PATTERN"
            )
    names = Counter(shard.name for shard in shards.values() if not shard.is_remote)
    return [replace(shard, path=shard.location) if names[shard.name] > 1 else shard for shard in shards.values()]


def configured_shards(config: DataConfig, split: Split) -> list[Shard]:
    """The shards of a run's training data, or of all its validation sets. Raises SourceError."""
    groups = [config.train] if split == "train" else config.validation.values()
    return [shard for sources in groups for shard in shards_of(sources, config, split)]


def _resolve(source: TextSource, split: Split, config: DataConfig) -> Iterator[Shard]:
    text = source.source
    name = set_name(source, split)
    if name is not None and name.on_hub:
        commit = commit_of(name, config)
        for path in hub_files(name, commit, config.timeout_seconds):
            yield hub_shard(name.place, commit, path)
    elif name is not None:
        folder = Path(from_home(name.place))
        yield from _local_shards([str(folder / path) for path in files_in(name, folder)])
    elif "://" in text:
        yield from _url_shards(text)
    elif is_token_folder(folder := Path(from_home(text))):
        yield from token_shards(folder)
    else:
        yield from _local_shards(_paths(text))


def _url_shards(source: str) -> Iterator[Shard]:
    """Raises SourceError for a url that is neither of http(s) nor of a store of fsspec."""
    protocol = source.partition("://")[0]
    if protocol not in ("http", "https"):
        from fsspec.registry import get_filesystem_class

        try:
            get_filesystem_class(protocol)
        except (ValueError, ImportError) as error:
            raise SourceError(
                f"{protocol}:// cannot be read ({error}); install its package for fsspec, or correct it"
            ) from error
    for url in expand_braces(source):
        try:
            name = public_url(url)
        except ValueError as error:
            raise SourceError(f"{url}: not a valid url ({error}); check it") from error
        yield Shard(name, url)


def token_shards(folder: Path) -> Iterator[Shard]:
    """The files of a finished folder of tokens."""
    files = finished_files(folder)
    paths = [str(file_in(folder, number)) for number in range(len(files))]
    for shard, file in zip(_local_shards(paths, f"make it again: {COMMAND}"), files, strict=True):
        yield replace(shard, tokens=file)


def _paths(source: str) -> list[str]:
    """The paths that match a local path or glob, sorted. Raises SourceError if some of a range are missing."""
    pattern = str(Path(from_home(source)))
    try:
        patterns = [glob.escape(pattern)] if Path(pattern).is_file() else expand_braces(pattern)
        # Path.glob takes no absolute pattern
        found = {each: glob.glob(each, recursive=True) for each in patterns}  # noqa: PTH207
    except OSError as error:
        raise unreadable(source, error, "check the path and its permissions") from error
    matched = {path for matches in found.values() for path in matches}
    missing = [each for each, matches in found.items() if not matches]
    if matched and missing:
        raise SourceError(f"{source}: no file matches {', '.join(missing[:3])}; name only files that exist")
    return sorted(matched)


def _local_shards(paths: Iterable[str], remedy: str = "check the path and its permissions") -> Iterator[Shard]:
    """The paths that are files and not, for instance, folders or pipes."""
    for path in map(Path, paths):
        try:
            status = path.stat()
        except OSError as error:  # such as a link to a missing file
            raise unreadable(str(path), error, remedy) from error
        if stat.S_ISREG(status.st_mode):
            yield Shard(path.name, str(path.absolute()), status.st_size, version_on_disk(status))


def _check_format(shard: Shard, source: str) -> None:
    path = PurePosixPath(shard.name)
    if format_of(shard.name) is None and (path.suffix or shard.hub or not shard.is_remote):
        raise SourceError(f"{source}: {path.name} is not a format that is read: {', '.join(SUFFIXES)}")
    if shard.is_remote and shard.format is ARROW:
        raise SourceError(f"{source}: {shard.name} is an Arrow file on a server; download it, or use Parquet")
    is_text = shard.records.is_text
    if shard.tokens is not None and is_text != (shard.tokens.making.records is None):
        raise SourceError(
            f"{shard.location} holds tokens of {'records' if is_text else 'plain text'}; "
            "set data.records as when they were made"
        )
    if not is_text and shard.tokens is None and shard.format is TEXT:
        raise SourceError(f"{shard.name} is text without columns and cannot hold records; set records.kind=text")


def public_url(url: str) -> str:
    """The url without user, password, query and fragment, which may be secret. Raises ValueError."""
    parts = urlsplit(url)
    assert parts.port is None or parts.port >= 0  # raises for a port that cannot be one
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def split_remark(shards: Sequence[Shard], data: DataConfig) -> str | None:
    """What is not obvious about files of text: that each paragraph is a document; None if there are no such files."""
    files = sum(shard.format is TEXT and shard.tokens is None for shard in shards)
    if not files or data.sample_by != "paragraph":
        return None
    return f"{counted(files, 'file')} of text, split at blank lines; one document a file: --data.sample_by=document"
