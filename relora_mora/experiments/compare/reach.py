"""The steps at which a metric reaches given values, for results other than a loss, such as accuracy of answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from relora_mora.experiments.compare.groups import Group, common_steps
from relora_mora.experiments.compare.runs import SHARES, CompareError, Run
from relora_mora.experiments.compare.table import Number, number_cell

FALLING = ("loss", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Reach:
    """A metric of ``metrics.jsonl`` and the values that it should reach."""

    tag: str
    values: tuple[float, ...]

    @property
    def title(self) -> str:
        return self.tag.rpartition("/")[2].replace("_", " ")

    def steps(self, run: Run, value: float) -> int | None:
        """The first step at which the run reached the value.

        A metric reaches it from above if it is a loss or similar, or if it is not a share and began above it.
        """
        series = run.series(self.tag)
        initial = next(iter(series.values()), math.nan)
        name = self.tag.rpartition("/")[2]
        falls = name in FALLING or (name not in SHARES and initial > value)
        reached = (step for step, current in series.items() if (current <= value if falls else current >= value))
        return next(reached, None)

    def last(self, group: Group) -> list[float]:
        """The last value of each run; for an unfinished group the values at the last common step, if there is one."""
        series = [run.series(self.tag) for run in group.runs]
        if group.is_finished:
            return [list(each.values())[-1] for each in series]
        common = common_steps(series)[-1:]
        return [each[step] for each in series for step in common]


def parse_reach(text: str, groups: Sequence[Group]) -> Reach:
    """Reads such as ``eval/character_accuracy=0.5,0.95``; raises :class:`CompareError` if a run lacks the metric."""
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
            raise CompareError(f"--reach: {run.folder} has no metric {tag}; it has {', '.join(known)}")
    return reach


def step_cells(reach: Reach, groups: Sequence[Group]) -> dict[str, list[str]]:
    """Columns of a table: for each value the mean step at which a group's runs reached it, and the last value."""
    columns = {
        f"{reach.title} {value:g}, step": [_steps(reach, group, value) for group in groups] for value in reach.values
    }
    columns[f"{reach.title} at the end"] = [
        number_cell(Number.of(last), ".3f") if (last := reach.last(group)) else "–" for group in groups
    ]
    return columns


def reach_notes(reach: Reach, groups: Sequence[Group]) -> list[str]:
    """Notes below the table that a reader of these columns needs."""
    of_set, _, name = reach.tag.rpartition("/")
    runs = [run for group in groups for run in group.runs]
    counts = {count for run in runs for count in list(run.series(f"{of_set}/answers").values())[-1:]}
    if name not in SHARES or len(counts) < 2:
        return []
    return [
        f"{reach.title}: runs generated different numbers of answers (eval.generate); their shares are not comparable."
    ]


def _steps(reach: Reach, group: Group, value: float) -> str:
    first_steps = [reach.steps(run, value) for run in group.runs]
    reached = [step for step in first_steps if step is not None]
    if not reached:
        return "not reached"
    steps = Number.of(reached)
    shown = number_cell(replace(steps, mean=round(steps.mean, 1)), ",.10g")  # a mean over seeds may be 4.5
    return shown if len(reached) == len(first_steps) else f"{shown}; {len(reached)} of {len(first_steps)} runs"
