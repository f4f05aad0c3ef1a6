"""Resolves sources of text into an ordered list of shards."""

import glob
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from relora_mora.config.data import DataConfig, Split, TextSource, as_sources, is_mixture
from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.named_sets import C4, SetName, commit_of, hub_files, hub_shard, set_name, split_files
from relora_mora.data.shard import ARROW, SUFFIXES, TEXT, RecordFormat, Shard, Version, format_of
from relora_mora.data.tokens.index import COMMAND, file_in, finished_files, is_token_folder
from relora_mora.system.files import from_home
from relora_mora.system.logs import counted

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 1_000_000


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
    if not listed:
        raise SourceError(f"the {split} data has no source; give a path, a glob, a url, OWNER/NAME or {C4}")
    mixed = split == "train" and is_mixture(listed)
    shards = []
    named: dict[str, tuple[Shard, str]] = {}
    for source in listed:
        settings = source.records or config.records
        record_format = RecordFormat.of(settings) if settings else None
        records_column = settings.columns.get("text") if settings else None
        for shard in _resolve(source, split, config):
            file = shard.location if shard.is_remote else os.path.realpath(shard.location)
            before, named_by = named.setdefault(file, (shard, source.source))
            if before is not shard:
                other_name = "" if before.name == shard.name else f" as {before.name}"
                raise SourceError(
                    f"{source.source}: {shard.name} is a file that {named_by} names already{other_name}; "
                    "its text would be read twice: give each file once"
                )
            column = source.text_column or records_column or config.text_column
            name = source.label if mixed or source.text_column or source.records else ""
            shard = replace(shard, text_column=column, records=record_format, source=name)
            _check_format(shard, source.source)
            shards.append(shard)
    names = Counter(shard.name for shard in shards if not shard.is_remote)
    return [replace(shard, path=shard.location) if names[shard.name] > 1 else shard for shard in shards]


def configured_shards(config: DataConfig, split: Split) -> list[Shard]:
    """The shards of a run's training data, or of all its validation sets. Raises SourceError."""
    groups = [config.train] if split == "train" else config.validation.values()
    return [shard for sources in groups for shard in shards_of(sources, config, split)]


def expand_braces(pattern: str) -> list[str]:
    """``a{00..02}`` is a00, a01, a02; several ranges give every combination, the last one changing fastest."""
    pieces = _BRACES.split(pattern)  # text, first, last, text, first, last, text
    limits = list(zip(pieces[1::3], pieces[2::3], strict=True))
    for first, last in limits:
        if int(last) < int(first):
            raise SourceError(f"{pattern}: the range {{{first}..{last}}} counts down; write {{{last}..{first}}}")
    if math.prod(int(last) - int(first) + 1 for first, last in limits) > _MAX_SHARDS:
        raise SourceError(f"{pattern}: its ranges name more than {_MAX_SHARDS:,} shards; shorten them")
    ranges = [[str(each).zfill(len(first)) for each in range(int(first), int(last) + 1)] for first, last in limits]
    texts = pieces[0::3]
    return [
        texts[0] + "".join(number + text for number, text in zip(numbers, texts[1:], strict=True))
        for numbers in itertools.product(*ranges)
    ]


def _resolve(record: TextSource, split: Split, config: DataConfig) -> Iterator[Shard]:
    source = record.source
    name = set_name(record, split)
    if name is not None and name.on_hub:
        yield from _hub_shards(name, config)
    elif name is not None:
        folder = Path(from_home(name.place))
        for path in name.patterns or map(glob.escape, split_files(name, folder)):
            yield from _local_shards(str(folder / path))
    elif "://" in source:
        yield from _url_shards(source)
    elif is_token_folder(folder := Path(from_home(source))):
        yield from token_shards(folder)
    else:
        yield from _local_shards(source)


def _hub_shards(name: SetName, config: DataConfig) -> Iterator[Shard]:
    commit = commit_of(name, config)
    for listed in hub_files(name, commit, config.timeout_seconds):
        for path in expand_braces(listed) if name.patterns else [listed]:
            _check_suffix(path, name.source)
            yield hub_shard(name.place, commit, path)


def _url_shards(source: str) -> Iterator[Shard]:
    """Raises SourceError for a url that is neither of http(s) nor of a store of fsspec."""
    protocol = source.partition("://")[0]
    if protocol not in ("http", "https"):
        from fsspec.registry import get_filesystem_class

        try:
            get_filesystem_class(protocol)
        except (ValueError, ImportError) as error:
            raise SourceError(
                f"{protocol}:// cannot be read ({error}); install its package for fsspec, or give a path, a glob, an "
                "http(s) url, hub:OWNER/NAME/PATTERN, or the url of a store such as s3://BUCKET/FILE"
            ) from error
        if glob.has_magic(source):
            raise SourceError(f"{public_url(source)}: stores are not listed; write a range such as {{00000..00007}}")
    for url in expand_braces(source):
        try:
            name = public_url(url)
            path = unquote(urlsplit(url).path)
        except ValueError as error:
            raise SourceError(f"{url}: not a valid url ({error}); check it") from error
        if PurePosixPath(path).suffix:
            _check_suffix(path, name)
        yield Shard(name, url)


def token_shards(folder: Path) -> Iterator[Shard]:
    """The files of a finished folder of tokens."""
    for number, file in enumerate(finished_files(folder)):
        path = file_in(folder, number).absolute()
        try:
            version = Version.on_disk(path.stat())
        except OSError as error:
            raise unreadable(str(path), error, f"make it again: {COMMAND}") from error
        yield Shard(path.name, str(path), size=version.size, version=version, tokens=file)


def _local_shards(source: str) -> Iterator[Shard]:
    pattern = str(Path(from_home(source)))
    try:
        patterns = [glob.escape(pattern)] if Path(pattern).is_file() else expand_braces(pattern)
        # Path.glob takes no absolute pattern
        found = {each: glob.glob(each, recursive=True) for each in patterns}  # noqa: PTH207
        matched = sorted({path for matches in found.values() for path in matches})
        missing = [each for each, matches in found.items() if not matches]
        if matched and missing:
            raise SourceError(
                f"{source}: no file matches {', '.join(missing[:3])}; fetch it, or name only files that exist"
            )
        if dangling := [path for path in matched if not Path(path).exists()]:
            raise SourceError(f"{dangling[0]} is a link to a missing file; restore the file or remove the link")
        paths = [path for path in matched if Path(path).is_file()]
        versions = [Version.on_disk(Path(path).stat()) for path in paths]
    except OSError as error:
        raise unreadable(source, error, "check the path and its permissions") from error
    if not paths:
        hint = f"; files on the hub are hub:{source}/PATTERN" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        hint = "; text is read more than once, so a pipe or a device is not a file" if matched else hint
        raise SourceError(f"no file matches {source} (from {Path.cwd()}); check the path{hint}")
    for path, version in zip(paths, versions, strict=True):
        _check_suffix(path, source)
        if format_of(path) is ARROW and is_token_folder(Path(path).parent):
            raise SourceError(
                f"{source}: {Path(path).parent} is a pre-tokenized folder, not text; give the folder itself"
            )
        yield Shard(Path(path).name, str(Path(path).absolute()), size=version.size, version=version)


def _check_format(shard: Shard, source: str) -> None:
    if shard.is_remote and shard.format is ARROW:
        raise SourceError(
            f"{source}: {shard.name} is an Arrow file on a server, and only local ones are read; "
            "download it, or name the set's Parquet files, or write it as Parquet"
        )
    tokens_of_records = shard.tokens is not None and shard.tokens.making.records is not None
    if shard.holds_records and not tokens_of_records and (shard.tokens is not None or shard.format is TEXT):
        assert shard.records is not None
        holds = "text without columns" if shard.tokens is None else "tokens of plain text"
        raise SourceError(
            f"{shard.name} holds {holds}, so it cannot hold records of kind {shard.records.settings.kind}; "
            "give files with columns or keys, or set records.kind=text"
        )
    if tokens_of_records and not shard.holds_records:
        raise SourceError(f"{shard.location} holds tokens of records; set data.records as when they were made")


def _check_suffix(path: str, source: str) -> None:
    if format_of(path) is None:
        raise SourceError(
            f"{source}: the format of {PurePosixPath(path).name} is not supported; "
            f"expected one of {', '.join(SUFFIXES)} (files with columns must not be compressed again)"
        )


def public_url(url: str) -> str:
    """The url without user, password, query and fragment, all of which may be secret. Raises ValueError."""
    parts = urlsplit(url)
    assert parts.port is None or parts.port >= 0  # raises for a port that cannot be one
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def split_remark(shards: Sequence[Shard], data: DataConfig) -> str | None:
    """What is not obvious about files of text: that each paragraph is a document; None if there are no such files."""
    files = sum(shard.format is TEXT and shard.tokens is None for shard in shards)
    if not files or data.sample_by != "paragraph":
        return None
    return f"{counted(files, 'file')} of text, split at blank lines; one document a file: --data.sample_by=document"
