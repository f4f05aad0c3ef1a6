"""A study's folder: a run folder for each cell, with settings, logs and records."""

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora_mora.config.checks.combinations import unused_settings
from relora_mora.config.lengths import tree_of
from relora_mora.config.load import FINETUNING, ConfigError, config_of, stored_config
from relora_mora.config.schema import Config
from relora_mora.experiments.compare.labels import as_text
from relora_mora.experiments.compare.runs import RECORDS, read_records
from relora_mora.experiments.compare.settings import used_settings
from relora_mora.experiments.study.design import Cell, Study
from relora_mora.supervise.exits import FINISHED
from relora_mora.system.files import write_synced
from relora_mora.system.run_folder import RunFolder, read_json_lines

# settings that do not affect a run's numbers; a resume compares the text at its commits itself
NOT_COMPARED = {"train.run_dir", "data.commits"}


@dataclass(frozen=True)
class StudyFolder:
    """Paths and records of a study. Its runs are complete run folders that can be resumed, exported and so on."""

    path: Path

    def run(self, cell: Cell) -> RunFolder:
        return RunFolder(self.path / "runs" / cell.name)

    def settings(self, cell: Cell) -> Path:
        """The JSON file with all settings of a cell, from which its run is started."""
        return self.path / "settings" / f"{cell.name}.json"

    def log(self, cell: Cell) -> Path:
        return self.path / "logs" / f"{cell.name}.txt"

    @property
    def records(self) -> Path:
        """JSON lines, one for each finished run; see :mod:`relora_mora.experiments.study.record`."""
        return self.path / RECORDS

    @property
    def _commits(self) -> Path:
        return self.path / "commits.json"

    def commits(self) -> dict[str, str]:
        """The commit of each hub revision, from ``commits.json`` or else from the study's records."""
        if self._commits.exists():
            return dict(json.loads(self._commits.read_text(encoding="utf-8")))
        given = [record["given"]["data"].get("commits", {}) for record in self.kept().values()]
        return {revision: commit for commits in given for revision, commit in commits.items()}

    def find_commits(self, configs: Iterable[Config]) -> None:
        """Asks the hub once per study for the commits that these settings read, and writes them down.

        Raises SourceError if the hub does not answer.
        """
        from relora_mora.data.sources.names import with_commits  # a late import: it loads all data readers

        known = self.commits()
        for config in configs:
            known |= with_commits(config.data.model_copy(update={"commits": known | config.data.commits})).commits
        if known:
            write_synced(self._commits, json.dumps(known, indent=1) + "\n")

    def kept(self) -> dict[str, dict[str, Any]]:
        """The records by cell name; another machine may have written them.

        Raises ValueError if the file is damaged.
        """
        if not self.records.exists():
            return {}
        file = self.records.stat()
        return _kept(self.records, (file.st_mtime_ns, file.st_size))

    def is_done(self, cell: Cell) -> bool:
        """Whether there is a record of the run, from here or from another machine."""
        return cell.name in self.kept()

    def has_run(self, cell: Cell) -> bool:
        """Whether the run finished successfully and its folder is here, so that it can be recorded."""
        try:
            ends = read_json_lines(self.run(cell).ends)
        except (OSError, ValueError):  # missing, or truncated because the disk was full: the cell runs again
            return False
        return bool(ends) and ends[-1]["code"] == FINISHED and self.settings(cell).exists()

    def begin(self, configs: Mapping[Cell, Config]) -> None:
        """Writes the settings of cells.

        Raises ValueError if a cell was started or finished with other settings. If its model, text or tokenizer have
        changed since, the comparison says so.
        """
        faults = []
        for cell, config in configs.items():
            # a run writes its config only after it has found no fault in its settings
            has_begun = self.run(cell).config.exists() or self.is_done(cell)
            if has_begun and (changed := self._changed_settings(cell, config)):
                faults.append(
                    f"{self.run(cell).path} was started with {changed}; remove it, {self.settings(cell)} and its line "
                    f"in {self.records}, give another --out, or put back what has changed"
                )
        if faults:
            raise ValueError("\n".join(faults))
        for cell, config in configs.items():
            path = self.settings(cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(path, json.dumps(tree_of(config), ensure_ascii=False) + "\n")

    def _changed_settings(self, cell: Cell, config: Config) -> str:
        """Describes how the settings differ from those with which the cell was started; empty if they do not."""
        try:
            known = stored_config(self.given(cell), "")  # newer settings get their defaults
        except (ValueError, TypeError, KeyError):
            return "settings that cannot be read, or that this version does not know"
        unused = unused_settings(known.by_name).keys() & unused_settings(config.by_name).keys()
        changed = {name for name, value in config.by_name.items() if value != known.by_name[name]}
        changed -= NOT_COMPARED | unused
        return f"other settings ({', '.join(sorted(changed))})" if changed else ""

    def given(self, cell: Cell) -> dict[str, Any]:
        """The settings that the cell was started with.

        Raises ValueError, TypeError or KeyError if they cannot be read.
        """
        path = self.settings(cell)
        return dict(json.loads(path.read_text(encoding="utf-8")) if path.exists() else self.kept()[cell.name]["given"])


@functools.lru_cache(maxsize=2)
def _kept(records: Path, version: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Reads the records once for each ``version``, the file's modification time and size."""
    return {record["name"]: record for record in read_records(records)}


def cell_configs(study: Study, cells: list[Cell], folder: StudyFolder) -> dict[Cell, Config]:
    """The settings of every cell; raises ConfigError with the faults of all cells, each fault once.

    It is also a fault if a run will not have the metric of ``choose``, or if the runs share no held-out text.
    """
    defaults = FINETUNING if study.command == "finetune" else None
    commits = folder.commits()
    configs: dict[Cell, Config] = {}
    faults: dict[str, str] = {}
    seen: dict[str, Cell] = {}
    for cell in cells:
        overrides = cell.overrides(study) | {"train.run_dir": json.dumps(str(folder.run(cell).path))}
        if commits:
            overrides["data.commits"] = json.dumps(commits)
        try:
            config = config_of(study.base_tree, study.base, overrides, defaults=defaults)
        except ConfigError as error:
            cell_faults = error.faults
        else:
            configs[cell] = config
            cell_faults = [] if study.choose is None else study.choose.faults(config)
            if config.train.resume == "never":
                cell_faults.append("train.resume: never, but a study resumes its interrupted runs; leave it out")
            used = {name: value for name, value in used_settings(config.by_name).items() if name != "train.run_dir"}
            other = seen.setdefault(as_text(used), cell)
            if other is not cell:
                cell_faults.append(
                    f"grid: {cell.name} and {other.name} are equal, or differ only in settings that have no effect; "
                    "leave one out"
                )
        for fault in cell_faults:
            faults.setdefault(fault, cell.name)
    sets = [set(config.data.validation) for config in configs.values()]
    if sets and not set.intersection(*sets):
        fault = "data.validation: the runs have no set in common, which a table needs; make a study for each set"
        faults[fault] = "all runs together"
    refuse(faults, study)
    return configs


def refuse(faults: Mapping[str, str], study: Study) -> None:
    """Raises ConfigError if there are any faults; each names the first cell that has it."""
    if faults:
        raise ConfigError([f"{fault} (in {name})" for fault, name in faults.items()], f"the runs over {study.base}")
