"""Sets of text by name, most of them on the datasets hub, and the commit at which each repository is read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from relora_mora.config import DataConfig
from relora_mora.data.errors import SourceError
from relora_mora.data.token_index import is_token_folder

C4 = "allenai/c4"
C4_PATTERNS = {
    "train": "hub:allenai/c4/en/c4-train.{00000..01023}-of-01024.json.gz",
    "validation": "hub:allenai/c4/en/c4-validation.{00000..00007}-of-00008.json.gz",
}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"(?P<place>[^:]+)(?::(?P<config>[^:/]*))?(?::(?P<split>[^:/]*))?")
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_FILE = re.compile(r".*\.(jsonl?|gz|zst|parquet)", re.IGNORECASE)

_remembered: dict[tuple[str, str], str] = {}  # by repository and revision


def is_hub(source: str) -> bool:
    return source == C4 or source.startswith("hub:")


def hub_source(source: str, split: str) -> str:
    """The source in full, as hub:OWNER/NAME/PATTERN."""
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

    @property
    def folder(self) -> Path:
        return Path(os.path.expanduser(self.place))  # noqa: PTH111 - Path.expanduser raises where there is no such user


def dataset_name(source: str) -> DatasetName | None:
    """What ``PLACE[:CONFIG[:SPLIT]]`` names; None for a source of another kind, as a folder of tokens is.

    A folder of that name counts before the hub. What is named like a file, or would lie in a folder that there is, is a
    path, so that a slip in one is told at once and the hub is not asked.
    """
    match = None if is_hub(source) or "://" in source else _NAME.fullmatch(source)
    if match is None:
        return None
    place = match["place"]
    name = DatasetName(source, place, match["config"] or None, match["split"] or None, on_hub=False)
    if os.path.isdir(name.folder):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        return None if is_token_folder(name.folder) else name
    if not _ON_HUB.fullmatch(place) or _FILE.fullmatch(place) or os.path.isdir(name.folder.parent):  # noqa: PTH112
        return None
    return replace(name, on_hub=True)


class Commits:
    """The commit that ``revision`` is, by hub repository; each is asked for once."""

    def __init__(self, revision: str, timeout_seconds: float) -> None:
        self.revision = revision
        self.timeout_seconds = timeout_seconds
        self.known: dict[str, str] = {}

    def __getitem__(self, repo: str) -> str:
        if repo not in self.known:
            known = self.revision if _COMMIT.fullmatch(self.revision) else _remembered.get((repo, self.revision))
            if known is None:
                from relora_mora.data.hub import ask_for_commit  # here: its libraries take long to load

                known = ask_for_commit(repo, self.revision, self.timeout_seconds)
            self.known[repo] = known
        return self.known[repo]


def hub_commits(config: DataConfig) -> dict[str, str]:
    """The commit that ``revision`` is now, of each hub repository of the settings; asks the hub once for each."""
    sources = [s for group in (config.train, config.validation) for s in ([group] if isinstance(group, str) else group)]
    repos = {hub_parts(hub_source(source, "train"))[0] for source in sources if is_hub(source)}
    names = map(dataset_name, sources)
    repos |= {name.place for name in names if name is not None and name.on_hub}
    commits = Commits(config.revision, config.timeout_seconds)
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
