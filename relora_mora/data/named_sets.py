"""Sets of text by name, on the hub and in folders: the commits at which they are read, and their files.

``datasets`` finds the files of a configuration and split from their names and their READMEs alone.
"""

import functools
import glob
import itertools
import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from relora_mora.config.data import DataConfig, Split, TextSource
from relora_mora.data.errors import SourceError
from relora_mora.data.files import open_file
from relora_mora.data.network import ask_for_commit, hub_shard, list_files
from relora_mora.data.shard import format_of
from relora_mora.data.tokens.index import is_token_folder
from relora_mora.system.files import from_home

log = logging.getLogger(__name__)

C4 = "allenai/c4"
C4_PATTERNS = {
    "train": "en/c4-train.{00000..01023}-of-01024.json.gz",
    "validation": "en/c4-validation.{00000..00007}-of-00008.json.gz",
}
CARDS = ("README.md", ".huggingface.yaml")  # the files that describe a set, besides the names of its files
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"(?P<place>[^:]+)(?::(?P<config>[^:/]*))?(?::(?P<split>[^:/]*))?")
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = re.compile(r"hub:([\w.-]+/[\w.-]+)/(.+)")
_MOST_NAMES = 1_000_000
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class SetName:
    """A set of text. ``place`` is OWNER/NAME on the hub, or a folder."""

    source: str
    place: str
    on_hub: bool
    revision: str | None = None  # None: the revision in the settings
    config: str | None = None
    split: str = "train"
    patterns: tuple[str, ...] = ()  # of its files; empty: the files of the split


def set_name(source: TextSource, split: Split) -> SetName | None:
    """The set that a source names; None for a url, a path, and a folder of tokens.

    The source is ``hub:OWNER/NAME/PATTERN``, or ``PLACE[:CONFIG[:SPLIT]]``, for which a local folder wins over a name
    on the hub. Anything that looks like a file, or whose parent folder exists, is a path, so a typo fails at once and
    the hub is not asked. Raises SourceError for what only sets have, if the source is not a set.
    """
    text = source.source
    name = _set_name(source, split)
    of_sets = source.config or source.split or source.data_files
    if (source.revision and not (name and name.on_hub)) or (of_sets and (name is None or text.startswith("hub:"))):
        raise SourceError(
            f"{text}: only a source on the hub has a revision, and only a set by name (OWNER/NAME or a folder) has a "
            "config, a split or data_files; remove these keys, or give the name of the set"
        )
    return name


def _set_name(source: TextSource, split: Split) -> SetName | None:
    text = source.source
    if text.startswith("hub:"):
        match = _HUB_FILES.fullmatch(text)
        if match is None or {"", ".", ".."} & {*match[2].split("/")}:
            raise SourceError(f"{text}: expected hub:OWNER/NAME/PATTERN, such as hub:{C4}/en/*.json.gz")
        return SetName(text, match[1], on_hub=True, revision=source.revision, patterns=(match[2],))
    match = _NAME.fullmatch(text)
    if match is None or "://" in text:
        return None
    place = match["place"]
    folder = from_home(place)
    on_hub = not os.path.isdir(folder)  # noqa: PTH112 - Path.is_dir raises for a name that is too long
    is_path = not _ON_HUB.fullmatch(place) or format_of(place) or os.path.isdir(Path(folder).parent)  # noqa: PTH112
    is_c4 = on_hub and text == C4 and not (source.config or source.data_files)
    if (on_hub and is_path and not is_c4) or (not on_hub and is_token_folder(Path(folder))):
        return None
    wanted = source.split or match["split"] or split
    files = (source.data_files,) if isinstance(source.data_files, str) else tuple(source.data_files or ())
    if is_c4:
        if wanted not in C4_PATTERNS:
            raise SourceError(f"{C4} has no split {wanted}; its splits are {', '.join(C4_PATTERNS)}")
        files = (C4_PATTERNS[wanted],)
    config = source.config or match["config"] or None
    return SetName(text, place, on_hub, source.revision, config, wanted, files)


def expand_braces(pattern: str) -> list[str]:
    """``a{00..02}`` is a00, a01, a02; several ranges give every combination, the last one changing fastest.

    Nothing if a range counts down. Raises SourceError for a million names.
    """
    begin, *further = _BRACES.split(pattern)
    names = [begin]
    for first, last, text in zip(*[iter(further)] * 3, strict=True):
        numbers = range(int(first), int(last) + 1)
        if len(names) * len(numbers) > _MOST_NAMES:
            raise SourceError(f"{pattern}: its ranges name more than {_MOST_NAMES:,} files; shorten them")
        names = [f"{name}{number:0{len(first)}}{text}" for name in names for number in numbers]
    return names


# ---- on the hub ------------------------------------------------------------------------------------------------------


def is_on_disk(source: TextSource) -> bool:
    name = set_name(source, "train")
    return not name.on_hub if name is not None else "://" not in source.source


def commit_of(name: SetName, config: DataConfig) -> str:
    """The commit at which a set on the hub is read. Asks the hub if it is not in the settings."""
    revision = name.revision or config.revision
    if _COMMIT.fullmatch(revision):
        return revision
    known = config.commits.get(f"{name.place}@{revision}")
    if known is None and name.source == name.place:
        log.info("%s: there is no such folder here, so it is a set on the hub", name.place)
    return known or ask_for_commit(name.place, revision, config.timeout_seconds)


def with_commits(config: DataConfig) -> DataConfig:
    """The same settings with the current commit of each revision in them. Asks the hub for commits that are not known.

    One rank calls this and sends the result to the others, so that all ranks read the same commit even if somebody
    pushes to the hub meanwhile.
    """
    splits: tuple[Split, ...] = ("train", "validation")
    names = [set_name(source, split) for split in splits for source in config.sources(split)]
    asked = {f"{name.place}@{name.revision or config.revision}": name for name in names if name and name.on_hub}
    commits = {
        key: commit_of(name, config)
        for key, name in sorted(asked.items())
        if not _COMMIT.fullmatch(name.revision or config.revision)
    }
    return config.model_copy(update={"commits": commits})


@functools.lru_cache(maxsize=64)
def hub_files(name: SetName, commit: str, timeout_seconds: float) -> Sequence[str]:
    """The files of a set on the hub, which is asked once in a process. Raises SourceError.

    Ranges such as {00..15} are known without it. The set is laid out as a folder of empty files. So a set on the hub is
    resolved like one on a disk, and a network fault is never taken for an answer.
    """
    if name.patterns and not any(map(glob.has_magic, name.patterns)):
        return [file for pattern in name.patterns for file in expand_braces(pattern)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, PurePosixPath(name.place).name)
        for path in list_files(name.place, commit, timeout_seconds):
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise SourceError(f"{name.source}: {path!r} does not name a file inside of it")
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
            if path in CARDS:
                with closing(open_file(hub_shard(name.place, commit, path), timeout_seconds)) as card:
                    (root / path).write_bytes(card.read())
        return files_in(name, root)


# ---- in a folder -----------------------------------------------------------------------------------------------------


def files_in(name: SetName, root: Path) -> list[str]:
    """The files of a set that is in a folder, relative to it: those of its patterns, or those of its split.

    Raises SourceError for a pattern without files.
    """
    if not name.patterns:
        return _split_files(name, root)
    files: list[str] = []
    for pattern in itertools.chain(*map(expand_braces, name.patterns)):
        if {"/", ".."} & {*PurePosixPath(pattern).parts}:
            raise SourceError(f"{name.source}: {pattern} is not a pattern of files inside of the set")
        matches = glob.glob(pattern, root_dir=root, recursive=True)  # noqa: PTH207 - Path.glob takes no root_dir
        found = [path for path in matches if (root / path).is_file()]
        if not found:
            raise SourceError(f"{name.source}: {name.place} holds no files {pattern}; check the pattern")
        files += sorted(found)
    return files


def _split_files(name: SetName, root: Path) -> list[str]:
    """The files of the split that ``datasets`` would load, sorted.

    Raises SourceError for a configuration or split that does not exist, listing those that do. Warns of files next to
    them which ``datasets`` leaves out, as it does with those of another format than most.
    """
    source = name.source
    root = root.resolve()  # datasets needs its name, which "." lacks
    if (root / "dataset_dict.json").exists() or (root / "state.json").exists():
        raise SourceError(f"{source} was written by save_to_disk; give its files, such as {name.place}/*.arrow")
    splits = _splits(name, root)
    if not splits:
        raise SourceError(f"{source} holds no text files; check its content, or give its files by path")
    if name.split not in splits:
        raise SourceError(
            f"{source} has no split {name.split}; its splits are {', '.join(splits)}: "
            f"name one as {name.place}:{name.config or ''}:{next(iter(splits))}, or give files such as {name.place}/*"
        )
    files = [Path(path).resolve() for path in splits[name.split]]
    if not all(file.is_relative_to(root) for file in files):
        raise SourceError(f"{source}: its README names files outside of it; give the files by path")
    taken = {Path(path).name for path in itertools.chain(*splits.values())}
    others = [path.name for path in files[0].parent.iterdir() if format_of(path.name) and path.name not in taken]
    if others and name.config is None:
        log.warning("%s: datasets leaves out %s; name files to read with data_files", source, min(others))
    return sorted(file.relative_to(root).as_posix() for file in files)


def _splits(name: SetName, root: Path) -> Mapping[str, Sequence[str]]:
    """The files of each split; none if there is no text."""
    halted = sys.modules.get("torch", sys) is None  # datasets would take a halted import for an imported torch
    if halted:
        del sys.modules["torch"]
    import datasets

    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            builder = datasets.load_dataset_builder(str(root), name.config, cache_dir=cache)
        return {str(split): paths for split, paths in (builder.config.data_files or {}).items() if paths}
    except FileNotFoundError:
        return {}
    except Exception as error:  # of many types, since anybody may have written the README
        message = " ".join(str(error).split()).replace(str(root), name.source)
        raise SourceError(
            f"{name.source}: datasets cannot find its files ({message:.500}); "
            f"name a configuration as {name.place}:CONFIG, or give the files by path"
        ) from error
    finally:
        if halted:
            sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
