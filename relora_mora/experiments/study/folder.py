"""A study's folder: a run folder for each cell, with settings and logs; and records, which outlive the run folders."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from relora_mora.config.checks.data import missing_metric
from relora_mora.config.lengths import tree_of
from relora_mora.config.load import FINETUNING, ConfigError, config_of, stored_config
from relora_mora.config.schema import Config
from relora_mora.config.yaml_text import parse_yaml
from relora_mora.experiments.compare.runs import RECORDS, read_records
from relora_mora.experiments.compare.settings import as_text, compared_settings, used_settings
from relora_mora.experiments.study.design import Cell, Study
from relora_mora.supervise.exits import FINISHED
from relora_mora.system.files import write_synced
from relora_mora.system.run_folder import RunFolder, joined_start, read_json_lines

KEPT_LINES = 40  # of training, evenly over the steps; all evaluations are kept
NOT_KEPT = ("command", "host")  # of a start, because they are local

T = TypeVar("T")
V = TypeVar("V")
Record = dict[str, Any]


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
        """JSON lines, one for each finished run: the record that :func:`write_records` writes."""
        return self.path / RECORDS

    def kept(self) -> dict[str, Record]:
        """The records by cell name; another machine may have written them. Raises ValueError if the file is damaged."""
        records = read_records(self.records) if self.records.exists() else []
        return {record["name"]: record for record in records}

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells without a record, from here or from another machine."""
        kept = self.kept()
        return [cell for cell in cells if cell.name not in kept]

    def has_run(self, cell: Cell) -> bool:
        """Whether the run finished successfully and its folder is here, so that it can be recorded."""
        try:
            ends = read_json_lines(self.run(cell).ends)
        except (OSError, ValueError):  # missing, or truncated because the disk was full: the cell runs again
            return False
        return bool(ends) and ends[-1]["code"] == FINISHED and self.settings(cell).exists()

    def begin(self, configs: Mapping[Cell, Config]) -> None:
        """Writes the settings of cells. Cells that read the same revision of the hub get the same commit of it.

        Raises ValueError if a cell was started or finished with other settings, and SourceError if the hub does not
        answer. If a cell's model, text or tokenizer have changed since, the comparison says so.
        """
        from relora_mora.data.named_sets import with_commits  # a late import: it loads all data readers

        kept = self.kept()
        # a run writes its config only after it has found no fault in its settings
        begun = (cell for cell in configs if self.run(cell).config.exists() or cell.name in kept)
        faults = [
            f"{self.run(cell).path} was started with other settings ({changed}); remove it, {self.settings(cell)} and "
            f"its line in {self.records}, give another --out, or put back what has changed"
            for cell in begun
            if (changed := self._changed_settings(cell, configs[cell]))
        ]
        if faults:
            raise ValueError("\n".join(faults))
        folder = self.path / "settings"
        folder.mkdir(parents=True, exist_ok=True)
        given = [record["given"] for record in kept.values()]
        given += [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
        commits = {revision: commit for tree in given for revision, commit in tree["data"].get("commits", {}).items()}
        for cell, config in configs.items():
            data = with_commits(config.data.model_copy(update={"commits": commits | config.data.commits}))
            commits |= data.commits
            tree = tree_of(config.model_copy(update={"data": data}))
            write_synced(self.settings(cell), json.dumps(tree, ensure_ascii=False) + "\n")

    def _changed_settings(self, cell: Cell, config: Config) -> str:
        """The settings that differ from those with which the cell was started."""
        known = stored_config(self.given(cell), str(self.settings(cell)))  # newer settings get their defaults
        compared = compared_settings(known.by_name).keys() | compared_settings(config.by_name).keys()
        compared -= {"data.commits"}  # a resume compares the text at its commits itself
        return ", ".join(sorted(name for name in compared if known.by_name[name] != config.by_name[name]))

    def given(self, cell: Cell) -> dict[str, Any]:
        """The settings that the cell was started with."""
        path = self.settings(cell)
        return dict(json.loads(path.read_text(encoding="utf-8")) if path.exists() else self.kept()[cell.name]["given"])


def write_records(cells: Sequence[Cell], folder: StudyFolder) -> None:
    """Writes one line for each finished cell, in the order of ``cells``.

    A line has the cell's ``name`` and ``seed``; ``given``, all settings that it was started with; ``config``, these
    settings as the run resolved them; ``start``, the commit, versions and machine of the last start and the ``step`` of
    the first; and ``metrics``, the part of ``metrics.jsonl`` that tables and figures need. Existing lines stay; lines
    of cells outside ``cells`` come last.
    """
    kept = folder.kept()
    new = {cell.name: _record(cell, folder) for cell in cells if cell.name not in kept and folder.has_run(cell)}
    if new:
        records = {**kept, **new}
        names = dict.fromkeys([*(cell.name for cell in cells), *records])
        write_synced(folder.records, "".join(json.dumps(records[name]) + "\n" for name in names if name in records))


def _record(cell: Cell, folder: StudyFolder) -> Record:
    run = folder.run(cell)
    start = joined_start(read_json_lines(run.starts))
    return {
        "name": cell.name,
        "seed": cell.seed,
        "given": folder.given(cell),
        "config": parse_yaml(run.config.read_text(encoding="utf-8")),
        "start": {key: value for key, value in start.items() if key not in NOT_KEPT},
        "metrics": _thinned(read_json_lines(run.metrics)),
    }


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All evaluations, and some lines of the training with the last one."""
    training = [number for number, line in enumerate(lines) if "train/loss" in line]
    some = {*training[:: max(1, -(-len(training) // KEPT_LINES))], *training[-1:]}
    return [line for number, line in enumerate(lines) if number in some or any(tag.startswith("eval/") for tag in line)]


def final_metric(record: Record, metric: str) -> float | None:
    """The metric at the last step of a recorded run; None if it is not finite. Raises ValueError if it is missing."""
    steps = record["config"]["train"]["steps"]
    values: list[float | None] = [
        line[metric] for line in record["metrics"] if metric in line and line["step"] == steps
    ]
    if not values:
        raise ValueError(
            f"choose: {record['name']} has no {metric} of its last step, {steps}; remove the run's folder and its line "
            "in the records, so that the study repeats the run"
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
