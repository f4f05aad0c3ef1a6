"""The table of a comparison, in Markdown, and its files."""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

import pandas as pd

from relora_mora.experiments.compare.groups import UNKNOWN, Group, common_sets, count
from relora_mora.experiments.compare.settings import as_text
from relora_mora.system.bars import Bar
from relora_mora.system.files import disk_faults_named, write_synced

COSTS = (
    ("tokens/s", "perf/tokens_per_second", "median", ",.0f"),
    ("peak memory, GiB", "perf/peak_memory_gib", "max", ".2f"),
)
LARGE = 1e7  # a perplexity that needs no decimals


def markdown(groups: Sequence[Group], reference: Group) -> str:
    """A row for each group, with perplexities relative to those of ``reference``, and the notes that a reader needs.

    Raises :class:`CompareError` if the runs share no held-out text.
    """
    sets = common_sets(groups)
    tokens = [int(group.runs[0].tokens(min(group.last(name)[0][0] for name in sets))) for group in groups]
    columns = {"method": [group.method for group in groups]}
    if any(group.differs for group in groups):
        columns["settings"] = [group.differs for group in groups]
    words = len(columns)
    if any(len(group.runs) > 1 for group in groups):
        columns["seeds"] = [str(len(group.runs)) for group in groups]
    counts: list[dict[str, int]] = [
        next((c for run in group.runs if (c := run.noted("parameters"))), {}) for group in groups
    ]
    for what in ("trainable", "adapters"):
        columns[what] = [count(each.get(what)) for each in counts]
    columns["tokens"] = [count(each) + "*" * bool(group.state) for each, group in zip(tokens, groups, strict=True)]
    for name in sets:
        ending = f" ({name})" if name else ""
        found = [group.perplexities(name) for group in groups]
        compared_with = mean(reference.perplexities(name))
        columns[f"loss{ending}"] = [_spread([loss for _, loss in group.last(name)], ".4f") for group in groups]
        columns[f"perplexity{ending}"] = [_spread(each, ".2f" if max(each) < LARGE else ".3g") for each in found]
        columns[f"ratio{ending}"] = [f"{mean(each) / compared_with:.3f}" for each in found]
    for title, tag, over_run, spec in COSTS:
        of_runs = [pd.Series([run.series(tag).agg(over_run) for run in group.runs]) for group in groups]
        columns[title] = [_spread([*each.dropna()], spec) for each in of_runs]
    notes = [f"Loss in nats per token of held-out text; ratio: perplexity relative to {reference.label}."]
    if "seeds" in columns:
        notes.append("Means over seeds, with the lowest and the highest value in parentheses.")
    notes += [f"\\* {group.label}: {group.state}." for group in groups if group.state]
    if len(set(tokens)) > 1:
        notes.append("The runs were evaluated after unequal numbers of tokens: their ratios do not compare methods.")
    notes += [*_other_content(groups), *(note for name in sets for note in _other_scores(groups, name))]
    return table_of(columns, left=words) + "".join(f"\n{note}\n" for note in notes)


def table_of(columns: Mapping[str, Sequence[str]], *, left: int) -> str:
    """A Markdown table from its columns; the first ``left`` columns are words, the others are numbers."""
    lines = [
        " | ".join(columns),
        " | ".join(["---"] * left + ["---:"] * (len(columns) - left)),
        *(" | ".join(cells) for cells in zip(*columns.values(), strict=True)),
    ]
    return "".join(f"| {line} |\n" for line in lines)


def _other_content(groups: Sequence[Group]) -> list[str]:
    """Notes on settings that named different content in different runs."""
    noted = [
        (name, as_text(run.settings.get(name)), digest)
        for group in groups
        for run in group.runs
        for name, digest in run.began_with.items()
    ]
    contents = pd.DataFrame(noted, columns=["name", "value", "digest"]).groupby(["name", "value"]).digest.nunique()
    return [
        f"The runs began with different content of {name}={value}: they are not comparable."
        for name, value in contents[contents > 1].index
    ]


def _other_scores(groups: Sequence[Group], name: str) -> list[str]:
    """A note if a held-out set is not the same in all runs."""
    firsts = [group.runs[0] for group in groups]
    title = f"Set {name}" if name else "The held-out text"
    if any(len({run.scored(name, what) for run in firsts} - {None}) > 1 for what in ("digest", "tokens")):
        return [f"{title}: runs were scored on different tokens; their losses are not comparable."]
    return []


def _spread(values: Sequence[float], spec: str) -> str:
    """The mean, with the lowest and the highest value in parentheses if they look different."""
    if not values:
        return UNKNOWN
    shown, low, high = (format(value, spec) for value in (mean(values), min(values), max(values)))
    return shown if low == high else f"{shown} ({low}–{high})"


def write_files(folder: Path, name: str, table: str, draw: Callable[[], Mapping[str, bytes]]) -> None:
    """Writes a table and, if matplotlib is installed, the figures that ``draw`` returns by the names of their files.

    Each existing file is replaced atomically.
    """
    files: dict[str, str | bytes] = {name: table}
    if importlib.util.find_spec("matplotlib") is not None:
        with Bar("drawing figures"):
            files |= draw()
    else:
        sys.stderr.write("only the table is written: figures need matplotlib; pip install 'relora_mora[plot]'\n")
    with disk_faults_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for each, content in files.items():
        write_synced(folder / each, content)
