"""Groups runs that differ only in their seeds."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from relora_mora.experiments.compare.labels import differences, method_title
from relora_mora.experiments.compare.runs import CompareError, Run


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
    def parameters(self) -> dict[str, int]:
        return next((run.parameters for run in self.runs if run.parameters), {})

    @property
    def is_finished(self) -> bool:
        return all(run.is_finished for run in self.runs)

    @property
    def state(self) -> str:
        """The progress of the unfinished runs in words; empty if all runs have finished."""
        unfinished = [run for run in self.runs if not run.is_finished]
        if not unfinished:
            return ""
        if any(run.has_diverged for run in unfinished):
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


def group_runs(runs: Iterable[Run], unnamed: Sequence[str] = (), best: Sequence[str] = ()) -> list[Group]:
    """Groups the runs, in the order in which they are given.

    Besides settings, the number of parameters, the precision, and the digests of weights, text and tokenizer count.
    A run with the same settings and the same seed as another is not another seed: it gets a group of its own, whose
    label says why. Labels leave out the settings in ``unnamed``, such as ``optim.lr``. From groups that differ only in
    the settings ``best``, the one with the most seeds is kept; among equals, the one with the lowest last validation
    loss (of its worst seed), where finished groups come first.

    Raises :class:`CompareError` if no run has a setting that ``unnamed`` or ``best`` names.
    """
    members: list[list[Run]] = []
    for run in runs:
        fits = (each for each in members if all(_alike(run, other) and run.seed != other.seed for other in each))
        of_group = next(fits, None)
        if of_group is None:
            members.append([run])
        else:
            of_group.append(run)
    for option, names in (("unnamed", unnamed), ("best", best)):
        for name in names:
            if not any(name in group[0].settings for group in members):
                raise CompareError(f"--{option}: no run has a setting {name}; docs/settings.md lists all settings")
    if best:
        chosen: list[list[Run]] = []
        for of_group in sorted(members, key=lambda runs: -len(runs[0].notes)):  # a run without notes matches any other
            same = [others for others in chosen if _alike(of_group[0], others[0], best)][:1]
            chosen = [others for others in chosen if others not in same] + [min([*same, of_group], key=_rank)]
        members = [of_group for of_group in members if of_group in chosen]
    groups: list[Group] = []
    for of_group, named in zip(members, differences([each[0].compared for each in members], unnamed), strict=True):
        differs = filter(None, dict.fromkeys([named, *map(_history, of_group)]))
        groups.append(Group(method_title(of_group[0].compared), ", ".join(differs), tuple(of_group)))
    labels = Counter(group.label for group in groups)
    for index, group in enumerate(groups):
        if labels[group.label] > 1:
            before = [run for other in groups[:index] for run in other.runs]
            own_name = _own_name(group.runs[0], before, [*unnamed, *best])
            groups[index] = replace(group, differs=", ".join(filter(None, (group.differs, own_name))))
    return groups


def group_of(groups: Sequence[Group], name: str) -> Group:
    """The group of the run whose folder has this path or name; raises CompareError unless exactly one run matches."""
    matches = [(group, run) for group in groups for run in group.runs if run.is_named(name)]
    if len(matches) != 1:
        folders = ", ".join(str(run.folder) for _, run in matches)
        fault = f"matches {folders}" if matches else "matches none of the runs, or --best left it out"
        raise CompareError(f"{name}: {fault}; give the path of one run's folder")
    return matches[0][0]


def _alike(run: Run, other: Run, ignored: Sequence[str] = ()) -> bool:
    """Whether the runs may be seeds of one group, or would be without the settings in ``ignored``."""
    return _same_settings(run, other, ignored) and not _differing_notes(run, other, ignored)


def _same_settings(run: Run, other: Run, ignored: Sequence[str] = ()) -> bool:
    names = (run.compared.keys() | other.compared.keys()).difference(ignored)
    return all(run.compared.get(name) == other.compared.get(name) for name in names)


def _differing_notes(run: Run, other: Run, ignored: Sequence[str] = ()) -> set[str]:
    """The settings, without ``ignored``, for which both runs have notes that differ."""
    names = (run.notes.keys() & other.notes.keys()).difference(ignored, (name.partition(".")[0] for name in ignored))
    return {name for name in names if run.notes[name] != other.notes[name]}


def _rank(runs: Sequence[Run]) -> tuple[int, bool, float]:
    """Sorts better groups first. A run whose last loss is not finite has not finished."""
    last = [loss for run in runs for loss in run.series("eval/loss").iloc[-1:]]
    return -len(runs), not all(run.is_finished for run in runs), max(last, default=math.inf)


def _own_name(run: Run, before: Sequence[Run], ignored: Sequence[str]) -> str:
    """The name of a run's folder, and why the run is not another seed of one before it, apart from ``ignored``."""
    others = [other for other in before if _same_settings(run, other, ignored)]
    if differing := set().union(*(_differing_notes(run, other, ignored) for other in others)):
        return f"{run.folder.name} (other {', '.join(sorted(differing))})"
    is_same = any(other.seed == run.seed and _same_settings(run, other) for other in others)
    return f"{run.folder.name} (the same seed)" if is_same else run.folder.name


def _history(run: Run) -> str:
    """The step at which the run began if not 0, and the changes at its resumes, in words; empty for nearly all runs."""
    changes = [
        f"{' and '.join(dict.fromkeys(text.partition(':')[0] for text in changed))} changed at step {step:,}"
        for step, changed in run.changes
    ]
    began = [f"started from a checkpoint of step {run.first_step:,}"] if run.first_step else []
    return ", ".join(began + changes)
