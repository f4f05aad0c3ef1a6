"""When a metric reaches some values, for results that are no loss, such as the accuracy of generated answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from relora_mora.experiments.compare.groups import Group
from relora_mora.experiments.compare.runs import SHARES, CompareError, Run
from relora_mora.experiments.compare.table import Number, number_cell

FALLING = ("loss", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Reach:
    """A metric of ``metrics.jsonl`` and values of it."""

    tag: str
    values: tuple[float, ...]

    @property
    def title(self) -> str:
        return self.tag.rpartition("/")[2].replace("_", " ")

    def steps(self, run: Run, value: float) -> int | None:
        """The first step with the value or more; or less, of a loss and its like, and where another began above it."""
        series = run.series(self.tag)
        begin = next(iter(series.values()), math.nan)
        name = self.tag.rpartition("/")[2]
        falls = name in FALLING or (name not in SHARES and begin > value)
        beyond = (step for step, now in series.items() if (now <= value if falls else now >= value))
        return next(beyond, None)

    def last(self, group: Group) -> list[float]:
        """Of each run; in a group that has not ended, at the last step that all have, of which there may be none."""
        series = [run.series(self.tag) for run in group.runs]
        if group.is_finished:
            return [list(each.values())[-1] for each in series]
        common = group.common_steps(series)[-1:]
        return [each[step] for each in series for step in common]


def parse_reach(text: str, groups: Sequence[Group]) -> Reach:
    """Reads ``eval/character_accuracy=0.5,0.95``; raises :class:`CompareError` where a run does not have the metric."""
    tag, _, values = text.partition("=")
    try:
        reach = Reach(tag, tuple(float(value) for value in values.split(",")))
        if not all(map(math.isfinite, reach.values)):
            raise ValueError
    except ValueError:
        raise CompareError(
            f"--reach: got {text}, expected a metric and numbers, such as eval/character_accuracy=0.5,0.95"
        ) from None
    for run in (run for group in groups for run in group.runs):
        if not run.series(tag):
            known = sorted({name for line in run.lines for name in line if name.startswith("eval/")})
            raise CompareError(f"--reach: {run.folder} has no numbers {tag}; it has {', '.join(known)}")
    return reach


def step_cells(reach: Reach, groups: Sequence[Group]) -> dict[str, list[str]]:
    """Columns of a table: for each value the mean step at which the groups' runs reached it, and the metric's last."""
    columns = {
        f"{reach.title} {value:g}, step": [_steps(reach, group, value) for group in groups] for value in reach.values
    }
    columns[f"{reach.title} at the end"] = [
        number_cell(Number.of(last), ".3f") if (last := reach.last(group)) else "–" for group in groups
    ]
    return columns


def reach_notes(reach: Reach, groups: Sequence[Group]) -> list[str]:
    """What a reader of its columns must know."""
    of_set, _, name = reach.tag.rpartition("/")
    runs = [run for group in groups for run in group.runs]
    counts = {count for run in runs for count in list(run.series(f"{of_set}/answers").values())[-1:]}
    if name not in SHARES or len(counts) < 2:
        return []
    return [f"{reach.title}: runs generated different numbers of answers (eval.generate); their shares do not compare."]


def _steps(reach: Reach, group: Group, value: float) -> str:
    found = [reach.steps(run, value) for run in group.runs]
    reached = [step for step in found if step is not None]
    if not reached:
        return "not reached"
    steps = Number.of(reached)
    shown = number_cell(replace(steps, mean=round(steps.mean, 1)), ",.10g")  # a mean over seeds may be 4.5
    return shown if len(reached) == len(found) else f"{shown}; {len(reached)} of {len(found)} runs"
