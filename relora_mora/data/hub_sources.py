"""Sets of text by name, most of them on the datasets hub, and the commit at which each repository is read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from relora_mora.config import DataConfig, Split, TextSource, as_sources, map_records, texts_in
from relora_mora.data.errors import SourceError
from relora_mora.data.formats import format_of
from relora_mora.data.token_index import is_token_folder

C4 = "allenai/c4"
C4_PATTERNS = {
    "train": "hub:allenai/c4/en/c4-train.{00000..01023}-of-01024.json.gz",
    "validation": "hub:allenai/c4/en/c4-validation.{00000..00007}-of-00008.json.gz",
}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"(?P<place>[^:]+)(?::(?P<config>[^:/]*))?(?::(?P<split>[^:/]*))?")
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")

Revision = tuple[str, str]  # of a repository: its name, and that of a branch, tag or commit
SPLITS: tuple[Split, ...] = ("train", "validation")
_remembered: dict[Revision, str] = {}


def is_hub(source: str) -> bool:
    return source == C4 or source.startswith("hub:")


def hub_source(source: str, split: str) -> str:
    """The source in full, as hub:OWNER/NAME/PATTERN. Raises SourceError."""
    if source == C4 and split not in C4_PATTERNS:
        raise SourceError(f"{C4} has no split {split}, but {', '.join(C4_PATTERNS)}")
    return C4_PATTERNS[split] if source == C4 else source


def hub_parts(source: str) -> tuple[str, str]:
    """(OWNER/NAME, PATTERN) of a source in full. Raises SourceError."""
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


@dataclass(frozen=True)
class DatasetName:
    """A set of text. ``place`` is OWNER/NAME or a folder; config and split are None where they are not named."""

    source: str
    place: str
    config: str | None
    split: str | None
    on_hub: bool
    revision: str | None = None  # of the source alone; None: that of the settings
    data_files: tuple[str, ...] = ()  # patterns; none: the files of the split

    @property
    def folder(self) -> Path:
        return Path(os.path.expanduser(self.place))  # noqa: PTH111 - Path.expanduser raises where there is no such user


def dataset_name(source: TextSource) -> DatasetName | None:
    """What ``PLACE[:CONFIG[:SPLIT]]`` names; None for a source of another kind, as a folder of tokens is.

    A folder of that name counts before the hub. What is named like a file, or would lie in a folder that there is, is a
    path, so that a slip in one is told at once and the hub is not asked. Raises SourceError for a path or url with a
    configuration, split or files, which only sets have, and for a revision of what is not on the hub.
    """
    text = source.source
    asks_for_part = bool(source.config or source.data_files)
    match = None if (is_hub(text) and not asks_for_part) or "://" in text else _NAME.fullmatch(text)
    name = None if match is None else _named(source, match)
    if name is None and (asks_for_part or (source.split and not is_hub(text))):
        raise SourceError(
            f"{text}: only a set by name (OWNER/NAME or a folder) has a config, a split or data_files; "
            "name its files in the source, or give the name of the set"
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
    if not _ON_HUB.fullmatch(place) or format_of(place.lower()) or os.path.isdir(name.folder.parent):  # noqa: PTH112
        return None
    return replace(name, on_hub=True)


class Commits:
    """The commit that a revision is, by hub repository; each is asked for once."""

    def __init__(self, revision: str, timeout_seconds: float) -> None:
        self.revision = revision  # of sources that name none
        self.timeout_seconds = timeout_seconds
        self.known: dict[Revision, str] = {}

    def at(self, repo: str, revision: str | None = None) -> str:
        asked = (repo, revision or self.revision)
        if asked not in self.known:
            known = asked[1] if _COMMIT.fullmatch(asked[1]) else _remembered.get(asked)
            if known is None:
                from relora_mora.data.hub import ask_for_commit  # here: its libraries take long to load

                known = ask_for_commit(*asked, self.timeout_seconds)
            self.known[asked] = known
        return self.known[asked]


def hub_commits(config: DataConfig) -> dict[Revision, str]:
    """The commit that each revision of a hub repository in the settings is now; asks the hub once for each."""
    commits = Commits(config.revision, config.timeout_seconds)
    for split in SPLITS:
        for source in config.sources(split):
            repo = hub_repo(source)
            if repo is not None:
                commits.at(repo, source.revision)
    return commits.known


def pin_revision(config: DataConfig, commits: Mapping[Revision, str] | None = None) -> DataConfig:
    """The same settings with each revision replaced by the commit that it is now.

    One rank calls it and hands the result to the others, so that a push to the hub meanwhile cannot split the ranks.
    Texts in the place of records share ``revision``: it is left where they name two hub repositories.
    """
    found = hub_commits(config) if commits is None else commits

    def pinned(source: TextSource) -> TextSource:
        repo = hub_repo(source)
        commit = None if repo is None else found[repo, source.revision or config.revision]
        return source if commit is None else source.model_copy(update={"revision": commit})

    records = {
        "train": map_records(config.train, pinned),
        "validation": map_records(config.validation, pinned),
    }
    texts = as_sources([*texts_in(config.train), *texts_in(config.validation)])
    repos = {repo for source in texts if (repo := hub_repo(source)) is not None}
    revision = found[repos.pop(), config.revision] if len(repos) == 1 else config.revision
    return config.model_copy(update={**records, "revision": revision})


def remember_commits(commits: Mapping[Revision, str]) -> None:
    """From now on this process takes these for what revisions are, and asks the hub no more."""
    _remembered.clear()
    _remembered.update(commits)


def hub_repo(source: TextSource) -> str | None:
    """The hub repository that a source lies in."""
    name = dataset_name(source)
    if name is not None:
        return name.place if name.on_hub else None
    return hub_parts(hub_source(source.source, source.split or "train"))[0] if is_hub(source.source) else None
