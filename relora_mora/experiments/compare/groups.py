"""Groups runs that differ only in their seeds."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from relora_mora.experiments.compare.runs import CompareError, Run
from relora_mora.experiments.compare.settings import differences, method_title, texts_of

UNKNOWN = "–"


@dataclass(frozen=True)
class Group:
    """Runs that share all settings except the seeds: one row of a table, one line of a figure.

    ``method`` is the method's name in papers. ``differs`` lists the settings in which the groups of a comparison
    differ, and whether a run began at another run's checkpoint or changed settings at a resume.
    """

    method: str
    differs: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        return f"{self.method}, {self.differs}" if self.differs else self.method

    @property
    def is_finished(self) -> bool:
        return all(run.is_finished for run in self.runs)

    @property
    def state(self) -> str:
        """The progress of the unfinished runs in words; empty if all runs have finished."""
        unfinished = [run for run in self.runs if not run.is_finished]
        if not unfinished:
            return ""
        if any("eval/loss" in line and line["step"] == run.steps for run in unfinished for line in run.lines):
            return "its last loss is not finite"
        step = min(run.last_step for run in unfinished)
        return f"unfinished, step {step:,} of {unfinished[0].steps:,}"

    def losses(self, name: str) -> pd.DataFrame:
        """Losses on a held-out set at the steps that all runs have: [steps, runs]"""
        return pd.concat([run.evaluations(name) for run in self.runs], axis=1, join="inner").sort_index()

    def last(self, name: str) -> list[tuple[int, float]]:
        """The step at which each run is judged, and its loss there.

        It is the run's last evaluation if the group has finished, else the last that all runs have.
        """
        series = [run.evaluations(name) for run in self.runs]
        if self.is_finished:
            return [(each.index[-1], each.iloc[-1]) for each in series]
        step = self.losses(name).index[-1]
        return [(step, each[step]) for each in series]

    def perplexities(self, name: str) -> list[float]:
        """The perplexity of each run on a held-out set, at the step at which the run is judged."""
        return [math.exp(min(loss, 700.0)) for _, loss in self.last(name)]


def group_runs(given: Iterable[Run], unnamed: Sequence[str] = (), best: Sequence[str] = ()) -> list[Group]:
    """Groups the runs, in the order in which they are given.

    Besides settings, the content that they named and the history of the run count (``Run.notes``). A run with the same
    seed as another is not another seed, and gets a group of its own. Labels leave out the settings in ``unnamed``, such
    as ``optim.lr``; if they are equal then, they have the names of the runs' folders. From groups that differ only in
    the settings ``best``, the one with the most seeds is kept; among equals, the one with the lowest last validation
    loss (of its worst seed), where finished groups come first.

    Raises :class:`CompareError` if no run has a setting that ``unnamed`` or ``best`` names.
    """
    runs = [*given]
    for option, names in (("unnamed", unnamed), ("best", best)):
        for name in names:
            if not any(name in run.settings for run in runs):
                raise CompareError(f"--{option}: no run has a setting {name}; docs/settings.md lists all settings")
    rows = _rows(runs, best)
    compared = [seeds[0].compared for seeds in rows]
    groups = []
    for seeds, settings, named in zip(rows, compared, differences(compared, unnamed), strict=True):
        differs = filter(None, dict.fromkeys([named, *map(_history, seeds)]))
        groups.append(Group(method_title(settings), ", ".join(differs), seeds))
    labels = Counter(group.label for group in groups)
    return [
        replace(group, differs=", ".join(filter(None, (group.differs, group.runs[0].folder.name))))
        if labels[group.label] > 1
        else group
        for group in groups
    ]


def _rows(runs: Sequence[Run], best: Sequence[str]) -> list[tuple[Run, ...]]:
    """The runs of each group, as :func:`group_runs` says."""
    settings = texts_of(run.compared for run in runs).fillna("null")
    rest = _joined(settings, best)
    notes = texts_of(run.notes for run in runs)
    notes = notes.fillna(notes.groupby(rest).transform("first"))  # what a run has not noted is as in the runs like it
    notes = notes.fillna("null")
    frame = pd.DataFrame({"run": runs, "seed": [run.seed for run in runs]})
    frame["row"] = _joined(settings) + _joined(notes)
    frame["rest"] = rest + _joined(notes, best)
    frame["repeated"] = frame.groupby(["row", "seed"]).cumcount()
    rows = frame.groupby(["row", "repeated"], sort=False).agg({"run": tuple, "rest": "first"}).reset_index()
    if best:
        ranks = pd.DataFrame([*map(_rank, rows.run)], columns=["seeds", "is_unfinished", "loss"])
        ranked = rows.loc[ranks.sort_values([*ranks], kind="stable").index]
        rows = ranked.drop_duplicates("rest").sort_index()
    return [*rows.run]


def _joined(texts: pd.DataFrame, ignored: Sequence[str] = ()) -> pd.Series:
    """The texts of each row as one, without the columns ``ignored``."""
    return texts.drop(columns=[*ignored], errors="ignore").agg("\n".join, axis=1)


def group_of(groups: Sequence[Group], name: str) -> Group:
    """The group of the run whose folder has this path or name; raises CompareError unless exactly one run matches."""
    path = Path(name).resolve()
    runs = [(group, run) for group in groups for run in group.runs]
    matches = [(group, run) for group, run in runs if run.folder.name == name or run.folder.resolve() == path]
    if len(matches) != 1:
        folders = ", ".join(str(run.folder) for _, run in matches)
        fault = f"matches {folders}" if matches else "matches none of the runs, or --best left it out"
        raise CompareError(f"{name}: {fault}; give the path of one run's folder")
    return matches[0][0]


def common_sets(groups: Sequence[Group]) -> list[str]:
    """Names of the held-out sets on which all runs were evaluated, those of a group at a step that they share.

    They are in the order of the first run. Raises :class:`CompareError` if there is none.
    """
    runs = [run for group in groups for run in group.runs]
    common = [
        name
        for name in runs[0].validation_sets
        if all(name in run.validation_sets for run in runs) and not any(group.losses(name).empty for group in groups)
    ]
    if not common:
        raise CompareError(
            "the runs have no validation set in common that all have scored; compare runs that have evaluated the same "
            "data.validation at the same steps"
        )
    return common


def count(value: float | None) -> str:
    """A number with three digits and a unit, such as 1.23M."""
    if value is None:
        return UNKNOWN
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:  # rounds up to one unit
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:,.0f}{unit}"
    return f"{value:g}"


def _rank(runs: Sequence[Run]) -> tuple[int, bool, float]:
    """Sorts better groups first. A run whose last loss is not finite has not finished."""
    last = [loss for run in runs for loss in run.series("eval/loss").iloc[-1:]]
    return -len(runs), not all(run.is_finished for run in runs), max(last, default=math.inf)


def _history(run: Run) -> str:
    """The step at which the run began if not 0, and the changes at its resumes, in words; empty for nearly all runs."""
    (first_step, _), *changes = run.history
    began = [f"started from a checkpoint of step {first_step:,}"] if first_step else []
    named = ((step, dict.fromkeys(text.partition(":")[0] for text in changed)) for step, changed in changes)
    return ", ".join([*began, *(f"{' and '.join(names)} changed at step {step:,}" for step, names in named)])
