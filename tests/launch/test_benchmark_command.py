"""python -m launch.benchmark: its kinds, its help, its use under launchers, and how it takes turns."""

from __future__ import annotations

import pytest

from launch.benchmark.__main__ import main
from launch.benchmark.turns import medians, relative_spread, take_turns
from tests.tools.each import each

pytestmark = pytest.mark.more


def exit_code(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    return int(stop.value.code or 0)


@each("argv,message", [([], "KIND is missing"), (["stepss", "--help"], "got 'stepss'")])
def test_an_unknown_kind_is_refused_with_the_usage(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*argv) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"{message}, expected one of steps, layers\n")
    assert "usage: python -m launch.benchmark KIND" in shown.err
    assert shown.out == ""


def test_the_local_rank_that_deepspeed_puts_first_is_not_a_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--local_rank=0", "steps", "model.json", "--repeats=0") == 2
    assert "--repeats: got 0, expected at least 1" in capsys.readouterr().err


def test_turns_are_interleaved_and_the_first_do_not_count() -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    notes: list[str] = []
    measures = {"a": lambda: measure("a"), "b": lambda: measure("b")}
    rounds = list(take_turns(measures, rounds=3, warmup=1, note=notes.append))
    assert "".join(calls) == "abababab"
    assert [note.partition(":")[0] for note in notes] == [f"round {n} of 4" for n in (1, 2, 3, 4)]
    assert rounds == [{"a": 3.0, "b": 4.0}, {"a": 5.0, "b": 6.0}, {"a": 7.0, "b": 8.0}]
    assert medians(rounds) == {"a": 5.0, "b": 6.0}


def test_the_spread_is_relative_to_the_median() -> None:
    assert relative_spread([4.0]) == 0.0
    assert relative_spread([3.0, 4.0, 5.0]) == 0.25  # the extremes of few values
    assert relative_spread([1.0, 3.0, 4.0, 5.0, 99.0]) < 7  # an outlier counts less among more values
