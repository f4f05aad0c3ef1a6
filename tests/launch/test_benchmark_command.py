"""python -m launch.benchmark: its kinds, its help, its use under launchers, and how it takes turns."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launch.benchmark.__main__ import KINDS, main
from launch.benchmark.turns import medians, relative_spread, take_turns
from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more


def exit_code(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    return int(stop.value.code or 0)


def test_help_lists_the_kinds_and_says_how_to_start_several_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    shown = capsys.readouterr()
    assert all(kind in shown.out for kind in KINDS)
    assert "torchrun" in shown.out
    assert "deepspeed --num_gpus=2 --module" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(("argv", "message"), [([], "KIND is missing"), (["stepss", "--help"], "got 'stepss'")])
def test_an_unknown_kind_is_refused_with_the_usage(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*argv) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"{message}, expected one of steps, layers\n")
    assert "usage: python -m launch.benchmark KIND" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_own_help(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(kind, "--help") == 0
    shown = capsys.readouterr().out
    assert f"python -m launch.benchmark {kind}" in shown
    assert "__main__" not in shown


def test_the_local_rank_that_deepspeed_puts_first_is_not_a_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--local_rank=0", "steps", "model.json", "--repeats=0") == 2
    assert "--repeats: got 0, expected at least 1" in capsys.readouterr().err


def test_faults_name_the_command_as_it_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("layers", "model.json", "stray") == 2
    assert "see python -m launch.benchmark layers --help" in capsys.readouterr().err


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.benchmark", "nothing"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("got 'nothing', expected one of")


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
