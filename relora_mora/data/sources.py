"""Where text comes from: source patterns become an ordered list of shards, without listing any remote folder."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from relora_mora.config import DataConfig
from relora_mora.data.errors import SourceError, unreadable

Split = Literal["train", "validation"]

C4 = "allenai/c4"
C4_PATTERNS = {
    "train": "hub:allenai/c4/en/c4-train.{00000..01023}-of-01024.json.gz",
    "validation": "hub:allenai/c4/en/c4-validation.{00000..00007}-of-00008.json.gz",
}
SUFFIXES = (".json", ".jsonl", ".gz", ".zst")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_SHARDS = 1_000_000
_remembered: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Shard:
    """One file of ``{"text"}`` lines. ``name`` is the same on every machine and holds no secret; ``location`` is a path or url."""

    name: str
    location: str
    size: int | None = None  # bytes, local files only
    hub: bool = False  # requests carry the hub's token, where there is one

    @property
    def is_remote(self) -> bool:
        return self.location.startswith(("http://", "https://"))


def resolve_shards(
    sources: str | list[str], revision: str = "main", *, split: Split = "train", timeout_seconds: float = 600.0
) -> list[Shard]:
    """The shards of all sources, in the order given; those of a local glob are sorted by path.

    A source is ``allenai/c4`` (config ``en``, the files of ``split``), ``hub:OWNER/NAME/PATTERN``, an http(s) url, a local
    path or a local glob. ``{00000..01023}`` in urls and hub patterns stands for a range of numbers. Hub sources are
    addressed at the commit that ``revision`` is now. Raises SourceError for what names no file, or a file that was named before.
    """
    given = [sources] if isinstance(sources, str) else list(sources)
    if not given:
        raise SourceError(f"the {split} data has no source; give a path, a glob, a url, hub:OWNER/NAME/PATTERN or {C4}")
    commits = _Commits(revision, timeout_seconds)
    shards = []
    named: dict[str | tuple[int, int], tuple[Shard, str]] = {}
    for source in given:
        for shard in _resolve(source, split, commits):
            before, named_by = named.setdefault(_identity(shard), (shard, source))
            if before is not shard:
                as_well = "" if before.name == shard.name else f", there as {before.name}"
                raise SourceError(
                    f"{source}: {shard.name} is a file that {named_by} names already{as_well}; its text would be read twice: give each file once"
                )
            shards.append(shard)
    if len(shards) > _MAX_SHARDS:
        raise SourceError(
            f"the {split} data has {len(shards):,} shards, more than {_MAX_SHARDS:,}; shorten the ranges in its sources"
        )
    return shards


def hub_commits(config: DataConfig) -> dict[str, str]:
    """The commit that ``revision`` is now, of each hub repository of the settings; asks the hub once for each."""
    sources = [s for group in (config.train, config.validation) for s in ([group] if isinstance(group, str) else group)]
    repos = {_hub_parts(_hub_source(source, "train"))[0] for source in sources if _is_hub(source)}
    commits = _Commits(config.revision, config.timeout_seconds)
    return {repo: commits[repo] for repo in sorted(repos)}


def pin_revision(config: DataConfig, commits: Mapping[str, str] | None = None) -> DataConfig:
    """The same settings with ``revision`` replaced by the commit that it is now.

    One rank calls it and hands the result to the others, so that a push to the hub meanwhile cannot split the ranks.
    Unchanged where no source is on the hub, or where two hub repositories share the revision's name.
    """
    found = hub_commits(config) if commits is None else commits
    return config.model_copy(update={"revision": next(iter(found.values()))}) if len(found) == 1 else config


def remember_commits(revision: str, commits: Mapping[str, str]) -> None:
    """From now on this process takes these for what ``revision`` is, by repository, and asks the hub no more."""
    _remembered.clear()
    _remembered.update({(repo, revision): commit for repo, commit in commits.items()})


def expand_braces(pattern: str) -> list[str]:
    """``a{00..02}`` is a00, a01, a02; several ranges give every combination, the last one changing fastest."""
    pieces = _BRACES.split(pattern)  # text, first, last, text, first, last, text
    ranges = []
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        if int(last) < int(first):
            raise SourceError(f"{pattern}: the range {{{first}..{last}}} counts down; write {{{last}..{first}}}")
        if int(last) - int(first) >= _MAX_SHARDS:
            raise SourceError(
                f"{pattern}: the range {{{first}..{last}}} names more than {_MAX_SHARDS:,} shards; shorten it"
            )
        ranges.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
    texts = pieces[0::3]
    return [
        texts[0] + "".join(number + text for number, text in zip(numbers, texts[1:], strict=True))
        for numbers in itertools.product(*ranges)
    ]


class _Commits:
    """The commit of each hub repository at ``revision``, asked for once."""

    def __init__(self, revision: str, timeout_seconds: float) -> None:
        self.revision, self.timeout_seconds = revision, timeout_seconds
        self.known: dict[str, str] = {}

    def __getitem__(self, repo: str) -> str:
        if repo not in self.known:
            known = self.revision if _COMMIT.fullmatch(self.revision) else _remembered.get((repo, self.revision))
            if known is None:
                from relora_mora.data.hub import ask_for_commit

                known = ask_for_commit(repo, self.revision, self.timeout_seconds)
            self.known[repo] = known
        return self.known[repo]


def _resolve(source: str, split: Split, commits: _Commits) -> Iterator[Shard]:
    if _is_hub(source):
        yield from _hub_shards(_hub_source(source, split), commits)
    elif source.startswith(("http://", "https://")):
        for url in expand_braces(source):
            try:
                name, path = public_url(url), unquote(urlsplit(url).path)
            except ValueError as error:
                raise SourceError(f"{url}: no url that can be read ({error}); check it") from error
            _check_suffix(path, source, may_be_missing=True)
            yield Shard(name, url)
    elif "://" in source:
        raise SourceError(
            f"{source.split('://')[0]}:// is no kind of source; give a path, a glob, an http(s) url or hub:OWNER/NAME/PATTERN"
        )
    else:
        yield from _local_shards(source)


def _identity(shard: Shard) -> str | tuple[int, int]:
    """Equal for shards that are one file: by other paths, links, or another spelling of a url."""
    if not shard.is_remote:
        status = Path(shard.location).stat()
        return status.st_dev, status.st_ino
    from urllib3.util import parse_url

    try:
        url = parse_url(shard.location)  # lower case where that means nothing, without dots in the path
    except ValueError as error:
        raise SourceError(f"{shard.name}: no url that can be read ({type(error).__name__}); check it") from error
    default = {"http": 80, "https": 443}[url.scheme or ""]
    return url._replace(fragment=None, port=None if url.port == default else url.port).url


def _is_hub(source: str) -> bool:
    return source == C4 or source.startswith("hub:")


def _hub_source(source: str, split: str) -> str:
    return C4_PATTERNS[split] if source == C4 else source


def _hub_parts(source: str) -> tuple[str, str]:
    owner, _, rest = source.removeprefix("hub:").partition("/")
    name, _, pattern = rest.partition("/")
    if not (owner and name and pattern) or any(part in ("", ".", "..") for part in pattern.split("/")):
        raise SourceError(f"{source}: expected hub:OWNER/NAME/PATTERN, e.g. {C4_PATTERNS['validation']}")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(f"{owner}/{name}")
    except HFValidationError as error:
        raise SourceError(f"{source}: {error}") from error
    return f"{owner}/{name}", pattern


def _hub_shards(source: str, commits: _Commits) -> Iterator[Shard]:
    from huggingface_hub import hf_hub_url

    from relora_mora.data.hub import endpoint

    repo, pattern = _hub_parts(source)
    if any(sign in pattern for sign in "*?["):
        raise SourceError(
            f"{source}: a hub pattern is not listed, so * and ? cannot be used; write a range such as {{00000..00007}}"
        )
    paths = expand_braces(pattern)
    _check_suffix(paths[0], source)
    commit = commits[repo]
    for path in paths:
        url = hf_hub_url(repo, path, repo_type="dataset", revision=commit, endpoint=endpoint())
        yield Shard(f"hub:{repo}@{commit}/{path}", url, hub=True)


def _local_shards(source: str) -> Iterator[Shard]:
    pattern = str(Path(os.path.expanduser(source)))  # noqa: PTH111 - Path.expanduser raises where there is no such user
    try:
        if Path(pattern).is_file():
            paths = [pattern]
        elif Path(pattern).is_dir():
            raise SourceError(f"{source} is a folder; give its files, e.g. {source.rstrip('/')}/*.json.gz")
        else:
            # Path.glob takes no absolute pattern
            found = {path for one in expand_braces(pattern) for path in glob.glob(one, recursive=True)}  # noqa: PTH207
            paths = sorted(path for path in found if Path(path).is_file())
            if not paths and (
                pipes := sorted(path for path in found if Path(path).exists() and not Path(path).is_dir())
            ):
                raise SourceError(f"{pipes[0]} is a pipe or a device, and text is read more than once; give a file")
        sizes = [Path(path).stat().st_size for path in paths]
    except OSError as error:
        raise unreadable(source, error, "check the path and its permissions") from error
    if not paths:
        hint = f"; a dataset on the hub is hub:{source}/PATTERN" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        raise SourceError(f"no file matches {source} (from {Path.cwd()}); check the path{hint}")
    for path, size in zip(paths, sizes, strict=True):
        _check_suffix(path, source)
        yield Shard(Path(path).name, str(Path(path).absolute()), size=size)


def _check_suffix(path: str, source: str, *, may_be_missing: bool = False) -> None:
    suffix = PurePosixPath(path).suffix
    if suffix not in SUFFIXES and not (may_be_missing and not suffix):
        raise SourceError(
            f'{source}: {PurePosixPath(path).name} is no shard of {{"text"}} lines; expected one of {", ".join(SUFFIXES)}'
        )


def public_url(url: str) -> str:
    """The url without user, password, query and fragment, any of which may be a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
