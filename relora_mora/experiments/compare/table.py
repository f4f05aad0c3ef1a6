"""The rows of a comparison, as Markdown and as JSON."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from relora_mora.experiments.compare.groups import Group, common_steps
from relora_mora.experiments.compare.runs import CompareError, Run

LARGE = 1e7  # a perplexity that needs no decimals


@dataclass(frozen=True)
class Number:
    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Number":
        return Number(mean(values), min(values), max(values))


@dataclass(frozen=True)
class Validation:
    """The last evaluation of a held-out set that all runs of a group have."""

    loss: Number  # nats per token
    perplexity: Number
    ratio: float  # of the perplexity to the reference row's
    scored_tokens: int | None
    digest: str | None  # of what was scored; None if no run of the group has noted it
    text: str  # the scored text and the tokenizer, as named in the settings


@dataclass(frozen=True)
class Row:
    """A group of runs in numbers. Parameters and rates are None if no run has noted them."""

    label: str
    method: str
    differs: str
    folders: list[str]
    seeds: int
    state: str  # empty if finished
    step: int  # of the evaluation
    tokens: int  # trained on until that step
    total_parameters: int | None
    trainable_parameters: int | None
    adapter_parameters: int | None
    validation: dict[str, Validation]  # by the name of the set, "" for a set without a name
    tokens_per_second: Number | None
    peak_memory_gib: Number | None
    began_with: dict[str, dict[str, str]]  # digests of the files that settings name, by setting and its value


def compare(groups: Sequence[Group], against: Group | None = None) -> list[Row]:
    """A row for each group, with perplexities relative to those of ``against``, by default the first group.

    Raises :class:`CompareError` if the runs share no held-out text.
    """
    sets = common_sets(groups)
    reference = against or groups[0]
    evaluated = {name: mean(perplexities(reference, name)) for name in sets}
    return [_row(group, evaluated) for group in groups]


def common_sets(groups: Sequence[Group]) -> list[str]:
    """Names of the held-out sets that all runs were evaluated on, in the order of the first run.

    Raises :class:`CompareError` if there is none.
    """
    runs = [run for group in groups for run in group.runs]
    for run in runs:
        if not run.validation_sets:
            raise CompareError(f"{run.folder}: no evaluation yet (eval/loss); leave it out, or wait for its first one")
    common = [name for name in runs[0].validation_sets if all(name in run.validation_sets for run in runs)]
    if not common:
        firsts: dict[str, Run] = {}
        for run in runs:
            firsts.setdefault(", ".join(map(_set_title, run.validation_sets)), run)
        named = "; ".join(f"{run.folder}: {sets}" for sets, run in firsts.items())
        raise CompareError(
            f"the runs have no validation set in common ({named}); compare runs with the same data.validation"
        )
    for name in common:
        for run in runs:
            if not run.evaluations(name):
                raise CompareError(f"{run.folder}: has no finite loss on {_set_title(name)}; leave the run out")
        for group in groups:
            if not common_steps([run.evaluations(name) for run in group.runs]):
                raise CompareError(
                    f"{group.label}: its seeds have no evaluated step in common; compare them separately"
                )
    return common


def _row(group: Group, reference: dict[str, float]) -> Row:
    first = group.runs[0]
    step = min(_step(group, first, name) for name in reference)
    parameters = next((run.parameters for run in group.runs if run.parameters), {})
    validation = {}
    for name, compared_with in reference.items():
        loss = Number.of(_losses(group, name))
        perplexity = Number.of(perplexities(group, name))
        ratio = perplexity.mean / compared_with
        digest = next((run.scored[name] for run in group.runs if name in run.scored), None)
        validation[name] = Validation(loss, perplexity, ratio, first.scored_tokens(name), digest, first.held_out(name))
    return Row(
        label=group.label,
        method=group.method,
        differs=group.differs,
        folders=[str(run.folder) for run in group.runs],
        seeds=len(group.runs),
        state=group.state,
        step=step,
        tokens=int(first.tokens(step)),
        total_parameters=parameters.get("total"),
        trainable_parameters=parameters.get("trainable"),
        adapter_parameters=parameters.get("adapters"),
        validation=validation,
        tokens_per_second=_over_seeds(group, "perf/tokens_per_second", median),
        peak_memory_gib=_over_seeds(group, "perf/peak_memory_gib", max),
        began_with={
            name: {
                json.dumps(run.settings.get(name), sort_keys=True): run.began_with[name]
                for run in group.runs
                if name in run.began_with
            }
            for name in sorted({name for run in group.runs for name in run.began_with})
        },
    )


def perplexities(group: Group, name: str) -> list[float]:
    """The perplexity of each run of a group on a held-out set, at the step at which the run is judged."""
    return [math.exp(min(loss, 700.0)) for loss in _losses(group, name)]


def _losses(group: Group, name: str) -> list[float]:
    return [run.evaluations(name)[_step(group, run, name)] for run in group.runs]


def _step(group: Group, run: Run, name: str) -> int:
    """The step at which a run is judged: its last evaluation if the group has finished, else the last common one."""
    if group.is_finished:
        return max(run.evaluations(name))
    return common_steps([each.evaluations(name) for each in group.runs])[-1]


def _over_seeds(group: Group, tag: str, over_run: Callable[[list[float]], float]) -> Number | None:
    series = [list(run.series(tag).values()) for run in group.runs]
    return Number.of([over_run(values) for values in series if values]) if any(series) else None


def markdown(rows: Sequence[Row], against: Group | None = None) -> str:
    """The table, with notes below it that a reader needs."""
    sets = list(rows[0].validation)
    columns: dict[str, list[str]] = {"method": [row.method for row in rows]}
    if any(row.differs for row in rows):
        columns["settings"] = [row.differs for row in rows]
    if any(row.seeds > 1 for row in rows):
        columns["seeds"] = [str(row.seeds) for row in rows]
    columns["trainable"] = [count(row.trainable_parameters) for row in rows]
    columns["adapters"] = [count(row.adapter_parameters) for row in rows]
    columns["tokens"] = [count(row.tokens) + "*" * bool(row.state) for row in rows]
    for name in sets:
        ending = f" ({name})" if name else ""
        results = [row.validation[name] for row in rows]
        columns[f"loss{ending}"] = [number_cell(each.loss, ".4f") for each in results]
        columns[f"perplexity{ending}"] = [
            number_cell(each.perplexity, ".2f" if each.perplexity.high < LARGE else ".3g") for each in results
        ]
        columns[f"ratio{ending}"] = [f"{each.ratio:.3f}" for each in results]
    columns["tokens/s"] = [number_cell(row.tokens_per_second, ",.0f") for row in rows]
    columns["peak memory, GiB"] = [number_cell(row.peak_memory_gib, ".2f") for row in rows]
    table = table_of(columns, left=sum(name in ("method", "settings") for name in columns))
    return table + "".join(f"\n{note}\n" for note in _notes(rows, against))


def table_of(columns: Mapping[str, Sequence[str]], *, left: int) -> str:
    """A Markdown table from its columns; the first ``left`` columns are words, the others are numbers."""
    lines = [
        " | ".join(columns),
        " | ".join(["---"] * left + ["---:"] * (len(columns) - left)),
        *(" | ".join(cells) for cells in zip(*columns.values(), strict=True)),
    ]
    return "".join(f"| {line} |\n" for line in lines)


def _notes(rows: Sequence[Row], against: Group | None) -> list[str]:
    compared_with = rows[0].label if against is None else against.label
    notes = [f"Loss in nats per token of held-out text; ratio: perplexity relative to {compared_with}."]
    if any(row.seeds > 1 for row in rows):
        notes.append("Means over seeds, with the lowest and the highest value in parentheses.")
    notes += [f"\\* {row.label}: {row.state}." for row in rows if row.state]
    if len({row.tokens for row in rows}) > 1:
        notes.append("The runs were evaluated after unequal numbers of tokens: their ratios do not compare methods.")
    for name in sorted({name for row in rows for name in row.began_with}):
        known: dict[str, set[str]] = {}
        for row in rows:
            for value, digest in row.began_with.get(name, {}).items():
                known.setdefault(value, set()).add(digest)
        notes += [
            f"The runs began with different content of {name}={value}: they are not comparable."
            for value, digests in known.items()
            if len(digests) > 1
        ]
    for name in rows[0].validation:
        title = _set_title(name).capitalize()
        scored = [row.validation[name] for row in rows]
        digests = {each.digest for each in scored}
        if len({each.scored_tokens for each in scored}) > 1 or len(digests - {None}) > 1:
            notes.append(f"{title}: runs were scored on different tokens; their losses are not comparable.")
        elif None in digests and len({each.text for each in scored}) > 1:
            notes.append(
                f"{title}: runs name different data.validation or tokenizer.path; their losses are comparable only if "
                "text and tokenizer are the same."
            )
    return notes


def _set_title(name: str) -> str:
    return f"set {name}" if name else "a set without a name"


def count(value: float | None) -> str:
    """A number with three digits and a unit, such as 1.23M."""
    if value is None:
        return "–"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:  # rounds up to one unit
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:,.0f}{unit}"
    return f"{value:g}"


def number_cell(number: Number | None, spec: str) -> str:
    """The mean, with the lowest and the highest value in parentheses if they look different."""
    if number is None:
        return "–"
    shown, low, high = (format(value, spec) for value in (number.mean, number.low, number.high))
    return shown if low == high else f"{shown} ({low}–{high})"
