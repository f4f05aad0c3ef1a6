"""Resolves sources of text into an ordered list of shards."""

import glob
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from relora_mora.config.data import DataConfig, RecordsConfig, Split, TextSource, as_sources, is_mixture
from relora_mora.data.errors import SourceError, unreadable
from relora_mora.data.shard import ARROW, SUFFIXES, TEXT, RecordFormat, Shard, Version, format_of
from relora_mora.data.sources.named_sets import dataset_files
from relora_mora.data.sources.names import (
    C4,
    Commits,
    DatasetName,
    dataset_name,
    hub_parts,
    hub_shard,
    hub_source,
    is_hub,
)
from relora_mora.data.tokens.index import COMMAND, file_in, finished_index, is_token_folder
from relora_mora.system.files import from_home

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 1_000_000


def resolve_shards(
    sources: str | Sequence[str | TextSource],
    revision: str = "main",
    *,
    commits: Mapping[str, str] | None = None,
    split: Split = "train",
    timeout_seconds: float = 600.0,
    text_column: str = "text",
    records: RecordsConfig | None = None,
) -> list[Shard]:
    """The shards of all sources, in the given order; the files of a local glob are sorted by path.

    A source is ``allenai/c4`` (config ``en``, the files of ``split``), a set ``OWNER/NAME[:CONFIG[:SPLIT]]`` on the hub
    or ``FOLDER[:CONFIG[:SPLIT]]``, ``hub:OWNER/NAME/PATTERN``, an http(s) url, a url of a store of fsspec, a local path
    or a local glob, or a pre-tokenized folder. ``{00000..01023}`` in paths, urls and hub patterns stands for a range of
    numbers. Hub sources are read at the commit of ``revision`` in ``commits``, or else at its current commit.
    ``text_column`` and ``records`` apply to sources that set none. Raises SourceError if a source names no file or a
    file that was named before, and for files that cannot hold such records.
    """
    listed = as_sources(sources)
    if not listed:
        raise SourceError(f"the {split} data has no source; give a path, a glob, a url, OWNER/NAME or {C4}")
    mixed = split == "train" and is_mixture(listed)
    at = Commits(revision, timeout_seconds, commits or {})
    shards = []
    named: dict[str | tuple[int, int], tuple[Shard, str]] = {}
    for source in listed:
        settings = source.records or records
        record_format = RecordFormat.of(settings) if settings else None
        records_column = settings.columns.get("text") if settings else None
        for shard in _resolve(source, split, at):
            before, named_by = named.setdefault(_identity(shard), (shard, source.source))
            if before is not shard:
                other_name = "" if before.name == shard.name else f" as {before.name}"
                raise SourceError(
                    f"{source.source}: {shard.name} is a file that {named_by} names already{other_name}; "
                    "its text would be read twice: give each file once"
                )
            if shard.is_remote and shard.format is ARROW:
                raise SourceError(
                    f"{source.source}: {shard.name} is an Arrow file on a server, and only local ones are read; "
                    "download it, or name the set's Parquet files, or write it as Parquet"
                )
            column = source.text_column or records_column or text_column
            name = source.label if mixed or source.text_column or source.records else ""
            shard = replace(shard, text_column=column, records=record_format, source=name)
            _check_columns(shard)
            shards.append(shard)
    return _with_unique_labels(shards)


def shards_of(sources: str | Sequence[str | TextSource], config: DataConfig, split: Split) -> list[Shard]:
    """The shards of the sources, with the settings' values for whatever a source does not set. Raises SourceError."""
    return resolve_shards(
        sources,
        config.revision,
        commits=config.commits,
        split=split,
        timeout_seconds=config.timeout_seconds,
        text_column=config.text_column,
        records=config.records,
    )


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


def _resolve(record: TextSource, split: Split, commits: Commits) -> Iterator[Shard]:
    source = record.source
    dataset = dataset_name(record)
    if dataset is not None:
        yield from _dataset_shards(dataset, split, commits)
    elif is_hub(source):
        yield from _hub_shards(hub_source(source, record.split or split), record.revision, commits)
    elif "://" in source:
        _check_store(source)
        for url in expand_braces(source):
            try:
                name = public_url(url)
                path = unquote(urlsplit(url).path)
            except ValueError as error:
                raise SourceError(f"{url}: not a valid url ({error}); check it") from error
            _check_suffix(path, source, may_be_missing=True)
            yield Shard(name, url)
    elif is_token_folder(folder := Path(from_home(source))):
        yield from token_shards(folder)
    else:
        yield from _local_shards(source)


def _check_store(source: str) -> None:
    """Raises SourceError for a url that is neither http(s) nor of a store that fsspec can read here."""
    protocol = source.partition("://")[0]
    if protocol in ("http", "https"):
        return
    from fsspec.registry import get_filesystem_class, known_implementations

    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        raise SourceError(f"{public_url(source)} needs a package ({error}): pip install {package}") from error
    except ValueError as error:
        raise SourceError(
            f"{protocol}:// is not supported; give a path, a glob, an http(s) url, hub:OWNER/NAME/PATTERN, or a url of "
            "a store that fsspec knows, such as s3://BUCKET/FILE"
        ) from error
    if any(sign in source for sign in "*?["):
        raise SourceError(f"{public_url(source)}: stores are not listed; write a range such as {{00000..00007}}")


def _with_unique_labels(shards: Sequence[Shard]) -> list[Shard]:
    """Gives local files with the same name labels: the shortest unique ends of their paths."""
    labels = {shard.location: shard.name for shard in shards if not shard.is_remote}
    for parts in itertools.count(2):
        counts = Counter(labels.values())
        same = [location for location, label in labels.items() if counts[label] > 1]
        if not same:
            break
        labels |= {location: "/".join(location.split("/")[-parts:]) for location in same}
    return [
        shard if labels.get(shard.location, shard.name) == shard.name else replace(shard, path=labels[shard.location])
        for shard in shards
    ]


def _check_columns(shard: Shard) -> None:
    """Raises SourceError if text without columns or tokens are read as records that they do not hold."""
    holds = ""
    if shard.tokens is not None and shard.tokens.making.records is None:
        holds = "tokens of plain text"
    elif shard.tokens is None and shard.format is TEXT:
        holds = "text without columns"
    if shard.holds_records and holds:
        assert shard.records is not None
        raise SourceError(
            f"{shard.name} holds {holds}, so it cannot hold records of kind {shard.records.settings.kind}; "
            "give files with columns or keys, or set records.kind=text"
        )
    if not shard.holds_records and shard.tokens is not None and shard.tokens.making.records is not None:
        raise SourceError(f"{shard.location} holds tokens of records; set data.records as when they were made")


def _identity(shard: Shard) -> str | tuple[int, int]:
    """A key that is equal for shards that are the same file, by other paths, links or another spelling of a url."""
    if not shard.is_remote:
        try:
            status = Path(shard.location).stat()
        except OSError as error:
            raise unreadable(shard.location, error, "check the path and its permissions") from error
        return status.st_dev, status.st_ino
    from urllib3.util import parse_url

    try:
        url = parse_url(shard.location)  # lower case if case does not matter, and without dots in the path
    except ValueError as error:
        raise SourceError(f"{shard.name}: not a valid url ({type(error).__name__}); check it") from error
    default = {"http": 80, "https": 443}.get(url.scheme or "")
    return url._replace(fragment=None, port=None if url.port == default else url.port).url


def _dataset_shards(name: DatasetName, split: Split, commits: Commits) -> Iterator[Shard]:
    paths = dataset_files(name, split, commits)
    for path in paths:
        _check_suffix(path, name.source)
    if name.on_hub:
        commit = commits.at(name.place, name.revision)
        yield from (hub_shard(name.place, commit, path) for path in paths)
    else:
        for path in paths:
            yield from _local_shards(str(name.folder / path))


def _hub_shards(source: str, revision: str | None, commits: Commits) -> Iterator[Shard]:
    repo, pattern = hub_parts(source)
    if any(sign in pattern for sign in "*?["):
        raise SourceError(
            f"{source}: the hub is not searched for patterns, so * and ? cannot be used; "
            "write a range such as {00000..00007}"
        )
    paths = expand_braces(pattern)
    _check_suffix(paths[0], source)
    commit = commits.at(repo, revision)
    yield from (hub_shard(repo, commit, path) for path in paths)


def token_shards(folder: Path) -> Iterator[Shard]:
    """The files of a finished folder of tokens."""
    for number, file in enumerate(finished_index(folder).token_files()):
        path = file_in(folder, number).absolute()
        try:
            version = Version.on_disk(path.stat())
        except OSError as error:
            raise unreadable(str(path), error, f"make it again: {COMMAND}") from error
        yield Shard(path.name, str(path), size=version.size, version=version, tokens=file)


def _local_shards(source: str) -> Iterator[Shard]:
    pattern = str(Path(from_home(source)))
    try:
        if Path(pattern).is_file():
            paths = [pattern]
        else:
            # Path.glob accepts no absolute pattern
            by_pattern = {each: glob.glob(each, recursive=True) for each in expand_braces(pattern)}  # noqa: PTH207
            matched = {path for matches in by_pattern.values() for path in matches}
            if dangling := sorted(path for path in matched if not Path(path).exists()):
                raise SourceError(f"{dangling[0]} is a link to a missing file; restore the file or remove the link")
            paths = sorted(path for path in matched if Path(path).is_file())
            missing = [each for each, matches in by_pattern.items() if not matches]
            if paths and missing:
                raise SourceError(
                    f"{source}: no file matches {', '.join(missing[:3])}; fetch it, or name only files that exist"
                )
            if not paths and (pipes := sorted(path for path in matched if not Path(path).is_dir())):
                raise SourceError(f"{pipes[0]} is a pipe or a device, but text is read more than once; give a file")
        versions = [Version.on_disk(Path(path).stat()) for path in paths]
    except OSError as error:
        raise unreadable(source, error, "check the path and its permissions") from error
    if not paths:
        hint = f"; files on the hub are hub:{source}/PATTERN" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        raise SourceError(f"no file matches {source} (from {Path.cwd()}); check the path{hint}")
    for folder in {Path(path).parent for path in paths if format_of(path) is ARROW}:
        if is_token_folder(folder):
            raise SourceError(f"{source}: {folder} is a pre-tokenized folder, not text; give the folder itself")
    for path, version in zip(paths, versions, strict=True):
        _check_suffix(path, source)
        yield Shard(Path(path).name, str(Path(path).absolute()), size=version.size, version=version)


def _check_suffix(path: str, source: str, *, may_be_missing: bool = False) -> None:
    if format_of(path) is None and not (may_be_missing and not PurePosixPath(path).suffix):
        raise SourceError(
            f"{source}: the format of {PurePosixPath(path).name} is not supported; "
            f"expected one of {', '.join(SUFFIXES)} (files with columns must not be compressed again)"
        )


def public_url(url: str) -> str:
    """The url without user, password, query and fragment, all of which may be secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
