"""What the sources in the settings name, and the commit at which each repository on the hub is read."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from relora_mora.config.data import DataConfig, Split, TextSource
from relora_mora.data.errors import SourceError
from relora_mora.data.shard import Shard, format_of
from relora_mora.data.tokens.index import is_token_folder
from relora_mora.system.files import from_home

C4 = "allenai/c4"
C4_PATTERNS = {
    "train": "en/c4-train.{00000..01023}-of-01024.json.gz",
    "validation": "en/c4-validation.{00000..00007}-of-00008.json.gz",
}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"(?P<place>[^:]+)(?::(?P<config>[^:/]*))?(?::(?P<split>[^:/]*))?")
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class SetName:
    """A set of text. ``place`` is OWNER/NAME on the hub, or a folder."""

    source: str
    place: str
    on_hub: bool
    revision: str | None  # None: the revision in the settings
    config: str | None
    split: str
    patterns: tuple[str, ...]  # of its files; empty: the files of the split


def set_name(source: TextSource, split: Split) -> SetName | None:
    """The set that a source names; None for a url, a path, and a folder of tokens.

    The source is ``hub:OWNER/NAME/PATTERN``, or ``PLACE[:CONFIG[:SPLIT]]``, for which a local folder wins over a name
    on the hub. Anything that looks like a file, or whose parent folder exists, is a path, so a typo fails at once and
    the hub is not asked. Raises SourceError for what only sets have, if the source is not a set.
    """
    name = _set_name(source, split)
    text = source.source
    if source.revision and not (name and name.on_hub):
        raise SourceError(f"{text}: only a source on the hub has a revision ({source.revision}); leave it out")
    if name is None and (source.config or source.split or source.data_files):
        raise SourceError(
            f"{text}: only a set by name (OWNER/NAME or a folder) has a config, a split or data_files; "
            "give the name of the set, or remove these keys and name the files in the source"
        )
    return name


def _set_name(source: TextSource, split: Split) -> SetName | None:
    text = source.source
    split = source.split or split  # type: ignore[assignment]
    files = (source.data_files,) if isinstance(source.data_files, str) else tuple(source.data_files or ())
    plain = SetName(text, text, True, source.revision, source.config, split, files)
    if text.startswith("hub:"):
        repo, pattern = _hub_parts(text)
        only_files = not (source.config or source.split or files)
        return replace(plain, place=repo, patterns=(pattern,)) if only_files else None
    if "://" in text or not (match := _NAME.fullmatch(text)):
        return None
    place = match["place"]
    folder = from_home(place)
    if os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        if is_token_folder(Path(folder)):
            return None
    elif text == C4 and not (source.config or files):
        if split not in C4_PATTERNS:
            raise SourceError(f"{C4} has no split {split}; its splits are {', '.join(C4_PATTERNS)}")
        return replace(plain, patterns=(C4_PATTERNS[split],))
    elif not _ON_HUB.fullmatch(place) or format_of(place) or os.path.isdir(Path(folder).parent):  # noqa: PTH112
        return None
    config = source.config or match["config"] or None
    split = source.split or match["split"] or split  # type: ignore[assignment]
    return replace(plain, place=place, on_hub=not os.path.isdir(folder), config=config, split=split)  # noqa: PTH112


def _hub_parts(source: str) -> tuple[str, str]:
    """(OWNER/NAME, PATTERN) of hub:OWNER/NAME/PATTERN. Raises SourceError."""
    owner, name, pattern = [*source.removeprefix("hub:").split("/", 2), "", ""][:3]
    if not (owner and name and pattern) or any(part in ("", ".", "..") for part in pattern.split("/")):
        raise SourceError(f"{source}: expected hub:OWNER/NAME/PATTERN, e.g. hub:{C4}/{C4_PATTERNS['validation']}")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(f"{owner}/{name}")
    except HFValidationError as error:
        raise SourceError(f"{source}: {error}") from error
    return f"{owner}/{name}", pattern


def commit_of(name: SetName, config: DataConfig) -> str:
    """The commit at which a set on the hub is read. Asks the hub if it is not in the settings."""
    revision = name.revision or config.revision
    if _COMMIT.fullmatch(revision):
        return revision
    from relora_mora.data.hub import ask_for_commit  # late: its libraries take long to load

    known = config.commits.get(f"{name.place}@{revision}")
    return known or ask_for_commit(name.place, revision, config.timeout_seconds)


def with_commits(config: DataConfig) -> DataConfig:
    """The same settings with the current commit of each revision in them. Asks the hub for commits that are not known.

    One rank calls this and sends the result to the others, so that all ranks read the same commit even if somebody
    pushes to the hub meanwhile.
    """
    asked = {(name.place, name.revision or config.revision): name for name in sets_on_hub(config)}
    commits = {
        f"{repo}@{revision}": commit_of(name, config)
        for (repo, revision), name in sorted(asked.items(), key=lambda item: item[0])
        if not _COMMIT.fullmatch(revision)
    }
    return config.model_copy(update={"commits": commits})


def sets_on_hub(config: DataConfig) -> list[SetName]:
    splits: tuple[Split, ...] = ("train", "validation")
    names = [set_name(source, split) for split in splits for source in config.sources(split)]
    return [name for name in names if name is not None and name.on_hub]


def hub_repo(source: TextSource) -> str | None:
    """The hub repository that holds a source; None if it is not on the hub."""
    name = set_name(source, "train")
    return name.place if name is not None and name.on_hub else None


def hub_shard(repo: str, commit: str, path: str) -> Shard:
    """A file of a repository at a commit."""
    from relora_mora.data.hub import file_url

    return Shard(f"hub:{repo}@{commit}/{path}", file_url(repo, commit, path), hub=True)
