"""A study's folder: a run folder for each cell, with settings and logs."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from relora_mora.config.checks.data import missing_metric
from relora_mora.config.lengths import tree_of
from relora_mora.config.load import FINETUNING, ConfigError, config_of, stored_config
from relora_mora.config.schema import Config
from relora_mora.experiments.compare.runs import Run
from relora_mora.experiments.compare.settings import as_text, compared_settings, used_settings
from relora_mora.experiments.study.design import Cell, Study
from relora_mora.supervise.exits import FINISHED
from relora_mora.system.files import write_synced
from relora_mora.system.run_folder import RunFolder, read_json_lines

T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class StudyFolder:
    """Paths of a study. Its runs are complete run folders that can be resumed, exported and so on."""

    path: Path

    def run(self, cell: Cell) -> RunFolder:
        return RunFolder(self.path / "runs" / cell.name)

    def settings(self, cell: Cell) -> Path:
        """The JSON file with all settings of a cell, from which its run is started."""
        return self.path / "settings" / f"{cell.name}.json"

    def log(self, cell: Cell) -> Path:
        return self.path / "logs" / f"{cell.name}.txt"

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells whose run has not finished."""
        return [cell for cell in cells if not self.is_done(cell)]

    def is_done(self, cell: Cell) -> bool:
        """Whether the run finished successfully."""
        try:
            ends = read_json_lines(self.run(cell).ends)
        except (OSError, ValueError):  # missing, or truncated because the disk was full: the cell runs again
            return False
        return bool(ends) and ends[-1]["code"] == FINISHED

    def begin(self, configs: Mapping[Cell, Config]) -> None:
        """Writes the settings of cells. Cells that read the same revision of the hub get the same commit of it.

        Raises ValueError if a cell was started with other settings, and SourceError if the hub does not answer. If a
        cell's model, text or tokenizer have changed since, the comparison says so.
        """
        from relora_mora.data.named_sets import with_commits  # a late import: it loads all data readers

        folder = self.path / "settings"
        given = {path: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
        # a run writes its config only after it has found no fault in its settings
        begun = (cell for cell in configs if self.run(cell).config.exists() and self.settings(cell) in given)
        faults = [
            f"{self.run(cell).path} was started with other settings ({changed}); remove it and {self.settings(cell)}, "
            "give another --out, or put back what has changed"
            for cell in begun
            if (changed := _changed_settings(self.settings(cell), given[self.settings(cell)], configs[cell]))
        ]
        if faults:
            raise ValueError("\n".join(faults))
        folder.mkdir(parents=True, exist_ok=True)
        commits = {
            revision: commit for tree in given.values() for revision, commit in tree["data"].get("commits", {}).items()
        }
        for cell, config in configs.items():
            data = with_commits(config.data.model_copy(update={"commits": commits | config.data.commits}))
            commits |= data.commits
            tree = tree_of(config.model_copy(update={"data": data}))
            write_synced(self.settings(cell), json.dumps(tree, ensure_ascii=False) + "\n")


def _changed_settings(path: Path, given: Mapping[str, Any], config: Config) -> str:
    """The settings that differ from those in a cell's file, with which it was started."""
    known = stored_config(given, str(path))  # newer settings get their defaults
    compared = compared_settings(known.by_name).keys() | compared_settings(config.by_name).keys()
    compared -= {"data.commits"}  # a resume compares the text at its commits itself
    return ", ".join(sorted(name for name in compared if known.by_name[name] != config.by_name[name]))


def final_metric(run: Run, metric: str) -> float | None:
    """The metric at the last step of a finished run; None if it is not finite. Raises ValueError if it is missing."""
    values = [line[metric] for line in run.lines if metric in line and line["step"] == run.steps]
    if not values:
        raise ValueError(
            f"choose: {run.folder} has no {metric} of its last step, {run.steps}; remove the folder, so that the "
            "study repeats the run"
        )
    return values[-1]


def cell_configs(study: Study, cells: Sequence[Cell], folder: StudyFolder) -> dict[Cell, Config]:
    """The settings of every cell; raises ConfigError with the faults of all cells, each fault once.

    It is also a fault if a run will not have the metric of ``choose``, or if the runs share no held-out text.
    """
    defaults = FINETUNING if study.command == "finetune" else None
    first: dict[str, Cell] = {}

    def config_for(cell: Cell) -> Config:
        overrides = cell.overrides(study) | {"train.run_dir": json.dumps(str(folder.run(cell).path))}
        config = config_of(study.base_tree, study.base, overrides, defaults=defaults)
        other = first.setdefault(as_text({**used_settings(config.by_name), "train.run_dir": ""}), cell)
        faults = []
        if study.choose is not None and (missing := missing_metric(config, study.choose.metric)):
            faults.append(f"choose: {study.choose.metric}: {missing}")
        if other is not cell:
            faults.append(
                f"grid: {cell.name} and {other.name} are equal, or differ only in settings that have no effect; "
                "leave one out"
            )
        if faults:
            raise ConfigError(faults, study.base)
        return config

    configs = dict(zip(cells, checked(study, zip(cells, cells, strict=True), config_for), strict=True))
    if cells and not set.intersection(*(set(config.data.validation) for config in configs.values())):
        fault = "data.validation: the runs have no set in common, which a table needs; make a study for each set"
        raise ConfigError([fault], study.base)
    return configs


def checked(study: Study, items: Iterable[tuple[Cell, V]], check: Callable[[V], T]) -> list[T]:
    """What ``check`` returns for an item of each cell.

    Raises ConfigError with the faults of all, each once and with the first cell that has it.
    """
    faults: dict[str, str] = {}
    results = []
    for cell, item in items:
        try:
            results.append(check(item))
        except (ValueError, OSError) as error:
            for fault in error.faults if isinstance(error, ConfigError) else [str(error)]:
                faults.setdefault(fault, cell.name)
    if faults:
        raise ConfigError([f"{fault} (in {name})" for fault, name in faults.items()], f"the runs over {study.base}")
    return results
