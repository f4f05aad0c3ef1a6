"""Names of sets of text, on the datasets hub or in local folders, and the commit at which each repository is read."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from relora_mora.config.data import DataConfig, Split, TextSource
from relora_mora.data.errors import SourceError
from relora_mora.data.shard import Shard, format_of
from relora_mora.data.tokens.index import is_token_folder
from relora_mora.system.files import from_home

C4 = "allenai/c4"
C4_PATTERNS = {
    "train": "hub:allenai/c4/en/c4-train.{00000..01023}-of-01024.json.gz",
    "validation": "hub:allenai/c4/en/c4-validation.{00000..00007}-of-00008.json.gz",
}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"(?P<place>[^:]+)(?::(?P<config>[^:/]*))?(?::(?P<split>[^:/]*))?")
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")

SPLITS: tuple[Split, ...] = ("train", "validation")


def is_hub(source: str) -> bool:
    return source.startswith("hub:") or (source == C4 and not Path(C4).is_dir())


def hub_source(source: str, split: str) -> str:
    """The full form of a source, hub:OWNER/NAME/PATTERN. Raises SourceError."""
    if source == C4 and split not in C4_PATTERNS:
        raise SourceError(f"{C4} has no split {split}; its splits are {', '.join(C4_PATTERNS)}")
    return C4_PATTERNS[split] if source == C4 else source


def hub_parts(source: str) -> tuple[str, str]:
    """(OWNER/NAME, PATTERN) of a source in its full form. Raises SourceError."""
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


def hub_shard(repo: str, commit: str, path: str) -> Shard:
    """A file of a repository at a commit."""
    from relora_mora.data.hub import file_url

    return Shard(f"hub:{repo}@{commit}/{path}", file_url(repo, commit, path), hub=True)


@dataclass(frozen=True)
class DatasetName:
    """A set of text. ``place`` is OWNER/NAME or a folder; ``config`` and ``split`` are None if they are not named."""

    source: str
    place: str
    config: str | None
    split: str | None
    on_hub: bool
    revision: str | None = None  # set for this source; None: the revision in the settings
    data_files: tuple[str, ...] = ()  # patterns; empty: the files of the split

    @property
    def folder(self) -> Path:
        return Path(from_home(self.place))


def dataset_name(source: TextSource) -> DatasetName | None:
    """The set that ``PLACE[:CONFIG[:SPLIT]]`` names; None for another kind of source, such as a folder of tokens.

    A local folder wins over a hub name. Anything that looks like a file, or whose parent folder exists, is a path, so a
    typo fails at once and the hub is not asked. Raises SourceError for a path or url with a configuration, split or
    files, which only sets have, and for a revision if the source is not on the hub.
    """
    text = source.source
    asks_for_part = bool(source.config or source.data_files)
    match = None if (is_hub(text) and not asks_for_part) or "://" in text else _NAME.fullmatch(text)
    name = None if match is None else _named(source, match)
    if name is None and (asks_for_part or (source.split and text != C4)):
        raise SourceError(
            f"{text}: only a set by name (OWNER/NAME or a folder) has a config, a split or data_files; "
            "give the name of the set, or remove these keys and name the files in the source"
        )
    if source.revision and not (is_hub(text) or (name is not None and name.on_hub)):
        raise SourceError(f"{text}: only a source on the hub has a revision ({source.revision}); leave it out")
    return name


def _named(source: TextSource, match: re.Match[str]) -> DatasetName | None:
    files = [source.data_files] if isinstance(source.data_files, str) else source.data_files or []
    place = match["place"]
    name = DatasetName(
        source.source,
        place,
        source.config or match["config"] or None,
        source.split or match["split"] or None,
        on_hub=False,
        revision=source.revision,
        data_files=tuple(files),
    )
    if os.path.isdir(name.folder):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        return None if is_token_folder(name.folder) else name
    if not _ON_HUB.fullmatch(place) or format_of(place) or os.path.isdir(name.folder.parent):  # noqa: PTH112
        return None
    return replace(name, on_hub=True)


class Commits:
    """The commits of hub repositories by revision. Each is asked for once, and those in ``known`` are not asked for."""

    def __init__(self, revision: str, timeout_seconds: float, known: Mapping[str, str]) -> None:
        self.revision = revision  # for sources that name none
        self.timeout_seconds = timeout_seconds
        self.known = dict(known)  # by REPO@REVISION

    @staticmethod
    def of(config: DataConfig) -> "Commits":
        return Commits(config.revision, config.timeout_seconds, config.commits)

    def at(self, repo: str, revision: str | None = None) -> str:
        revision = revision or self.revision
        if _COMMIT.fullmatch(revision):
            return revision
        asked = f"{repo}@{revision}"
        if asked not in self.known:
            from relora_mora.data.hub import ask_for_commit  # late: its libraries take long to load

            self.known[asked] = ask_for_commit(repo, revision, self.timeout_seconds)
        return self.known[asked]


def with_commits(config: DataConfig) -> DataConfig:
    """The same settings with the current commit of each revision in them. Asks the hub for commits that are not known.

    One rank calls this and sends the result to the others, so that all ranks read the same commit even if somebody
    pushes to the hub meanwhile.
    """
    asker = Commits.of(config)
    sources = [source for split in SPLITS for source in config.sources(split)]
    asked = {(repo, source.revision or config.revision) for source in sources if (repo := hub_repo(source))}
    named = sorted((repo, revision) for repo, revision in asked if not _COMMIT.fullmatch(revision))
    return config.model_copy(update={"commits": {f"{repo}@{name}": asker.at(repo, name) for repo, name in named}})


def hub_repo(source: TextSource) -> str | None:
    """The hub repository that holds a source; None if it is not on the hub."""
    name = dataset_name(source)
    if name is not None:
        return name.place if name.on_hub else None
    return hub_parts(hub_source(source.source, source.split or "train"))[0] if is_hub(source.source) else None
