"""Writes docs/support.md: ``python -m tests.support.page > docs/support.md``."""

from __future__ import annotations

import contextlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from relora_mora.config.registry import METHODS
from tests.support import elsewhere
from tests.support.evidence import TRAINING, Shown, shown
from tests.support.settings import DIMENSIONS, Combination, is_plain, refused_pairs

MOST_TESTS = 2  # named in a cell
_HEAD = """\
# What works together

Written by `python -m tests.support.page > docs/support.md`; do not edit it. A test compares it with
the checks of the settings and with the cases of the tests.

Everything here is tested on CPUs only. Nothing has been run on a GPU yet;
[performance](performance.md) says what has been counted without one.

| in a cell | what it means |
|---|---|
| tested 1, 2 | the [tests](#tests) with these numbers have this combination |
| untested | nothing refuses it, and no test has it |
| **no, a** | it is refused before anything is trained, with a message like the one below the table |
| – | the method does not use this setting, and the log says so |

A combination of more settings is refused only if it has a pair that one of these tables refuses. A
test tries every three settings, and `python -m tests.support.settings` tries all of them.
"""


class Table(NamedTuple):
    title: str
    rows: tuple[str, ...]  # the dimensions whose values make up a row
    columns: str  # the dimension with a column for each value


TABLES = (
    Table("Methods and ZeRO stages", ("method", "precision"), "ZeRO stage"),
    Table("Optimizers and methods", ("optimizer",), "method"),
    Table("Optimizers and ZeRO stages", ("optimizer",), "ZeRO stage"),
    Table("Optimizers of embeddings and head, and methods", ("embeddings",), "method"),
    Table("Optimizers of embeddings and head, and ZeRO stages", ("embeddings",), "ZeRO stage"),
    Table("Forms and methods", ("form",), "method"),
    Table("Forms and ZeRO stages", ("form",), "ZeRO stage"),
    Table("Forms and dropout", ("form",), "dropout"),
    Table("Stored weights and methods", ("base",), "method"),
    Table("Stored weights and ZeRO stages", ("base",), "ZeRO stage"),
    Table("Stored weights and forms", ("base",), "form"),
    Table("Operators and methods", ("operators",), "method"),
    Table("Resets and methods", ("reset",), "method"),
    Table("Resets and optimizers", ("reset",), "optimizer"),
    Table("Resets and operators", ("reset",), "operators"),
    Table("Compiled layers and ZeRO stages", ("compile",), "ZeRO stage"),
    Table("Compiled layers and methods", ("compile",), "method"),
    Table("Compiled layers and forms", ("compile",), "form"),
    Table("Activation checkpointing and methods", ("checkpointing",), "method"),
    Table("Attention and precision", ("attention",), "precision"),
    Table("Attention and data", ("attention",), "data"),
    Table("Initial weights and methods", ("start",), "method"),
    Table("Initial weights and ZeRO stages", ("start",), "ZeRO stage"),
    Table("Data and methods", ("data",), "method"),
)


class Tests:
    """Numbers the tests in the order in which cells name them."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, str], int] = {}

    def named(self, points: Iterable[Shown], combination: Combination) -> str:
        """Names a few tests that have a combination, first those that ``make test`` runs."""
        having = [point for point in points if combination.items() <= point.combination.items()]
        tests = dict.fromkeys((point.test, point.target) for point in having)
        first = sorted(tests, key=lambda test: test[1] != "make test")[:MOST_TESTS]
        numbers = [str(self.numbers.setdefault(test, len(self.numbers) + 1)) for test in first]
        return f"tested {', '.join(numbers)}" if numbers else "untested"

    def __str__(self) -> str:
        lines = ["## Tests", "", "| number | test | run by |", "|---|---|---|"]
        lines += [f"| {number} | `{test}` | `{target}` |" for (test, target), number in self.numbers.items()]
        return "\n".join(lines)


def _table(
    title: str,
    corner: str,
    rows: Sequence[Combination],
    columns: Sequence[Combination],
    cell: Callable[[Combination], str],
    refusal: Callable[[Combination], str | None],
) -> str:
    """A table with the messages of its refusals. A row and a column together are the combination of a cell.

    Messages that differ only in the values of the cell have one letter, and the first of them is shown.
    """
    letters: dict[str, tuple[str, str]] = {}  # by message without those values

    def text(combination: Combination) -> str:
        message = refusal(combination)
        if message is None:
            return cell(combination)
        values = "|".join(map(re.escape, combination.values()))
        kind = re.sub(rf"\b(?:{values})\b", "", message)
        letter, _ = letters.setdefault(kind, (chr(ord("a") + len(letters)), message))
        return f"**no, {letter}**"

    head = [corner, *(", ".join(column.values()) for column in columns)]
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [", ".join(row.values()), *(text(row | column) for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    for letter, message in letters.values():
        lines += ["", _wrapped(f"**{letter}**: {message}.")]
    return "\n".join(lines)


def _values(dimension: str) -> list[Combination]:
    return [{dimension: value} for value in DIMENSIONS[dimension]]


def _pair_refusal(combination: Combination) -> str | None:
    """The message of a refused pair in a combination; without a method, if every method that uses it has one."""
    methods = [combination["method"]] if "method" in combination else METHODS
    whole = [each for method in methods if is_plain(each := {"method": method} | combination)]
    found = [
        next((message for pair, message in refused_pairs().items() if set(pair) <= set(each.items())), None)
        for each in whole
    ]
    return found[0] if found and all(found) else None


def _of_settings(table: Table, points: Sequence[Shown], tests: Tests) -> str:
    def cell(combination: Combination) -> str:
        return tests.named(points, combination) if is_plain(combination) else "–"

    rows: list[Combination] = [{}]
    for dimension in table.rows:
        rows = [row | value for row in rows for value in _values(dimension)]
    return _table(table.title, ", ".join(table.rows), rows, _values(table.columns), cell, _pair_refusal)


def _machines() -> str:
    lines = ["## Refused on some machines, or elsewhere", ""]
    for what, message in elsewhere.other_refusals().items():
        lines.append(_wrapped(f"- **{what}**: {message}.", "  "))
    return "\n".join(lines)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def page() -> str:
    tests = Tests()
    points = shown(TRAINING)
    parts = [_HEAD, *(_of_settings(table, points, tests) for table in TABLES)]
    for other in elsewhere.TABLES:
        others = shown(other.evidence)
        parts.append(
            _table(
                other.title,
                other.row,
                [{other.row: value} for value in other.rows],
                [{other.column: value} for value in other.columns],
                lambda combination, others=others: tests.named(others, combination),
                other.refusal,
            )
        )
    return "\n\n".join(part.rstrip("\n") for part in [*parts, _machines(), str(tests)]) + "\n"


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed warns there when a test imports it
        text = page()
    sys.stdout.write(text)
