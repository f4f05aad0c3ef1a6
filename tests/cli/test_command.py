"""Command lines: raw text, every mistake before anything starts, one message and no traceback."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relora_mora.cli.command import run
from relora_mora.config.load import ConfigError
from relora_mora.distributed.collectives import same_on_all_ranks
from relora_mora.tokenizer.files import TokenizerError
from tests.tools.commands import PRETRAIN, call, refused
from tests.tools.each import each


def arguments(*argv: str) -> tuple[object, ...] | None:
    """What a command like pretrain is called with; None if it is not called, and exits with 2."""
    calls: list[tuple[object, ...]] = []

    def main(config: str, *, steps: int | None = None, rate: float = 0.5, fast: bool = False, **overrides: str) -> int:
        """Trains."""
        if "" in overrides:  # of a command line with faults
            raise ConfigError(["--: not a setting", "a.b: got 1"], "c")
        calls.append((config, steps, rate, fast, overrides))
        return 75

    with pytest.raises(SystemExit) as stop:
        run(main, argv)
    assert stop.value.code == (75 if calls else 2)
    return calls[0] if calls else None


@each(
    "line,expected",
    [
        (
            ["1e5", "--optim.lr=4e-4", "--a.a=a,b", "--a.b", "x y", "--c.d=-1", "--e.f=a=b"],  # text arrives as typed
            ("1e5", None, 0.5, False, {"optim.lr": "4e-4", "a.a": "a,b", "a.b": "x y", "c.d": "-1", "e.f": "a=b"}),
        ),
        (["c", "--steps=12", "--rate=1", "--fast"], ("c", 12, 1.0, True, {})),
        (["c", "--steps=null", "--rate=1e-3", "--fast=false"], ("c", None, 1e-3, False, {})),
        # the launchers' ranks are dropped
        (["--local_rank=1", "c", "--a.b=1"], ("c", None, 0.5, False, {"a.b": "1"})),
        (["c", "--a.b=1", "--local-rank=1"], ("c", None, 0.5, False, {"a.b": "1"})),
    ],
)
def test_arguments_arrive_as_annotated(line: list[str], expected: tuple[object, ...]) -> None:
    assert arguments(*line) == expected


def test_annotated_parameters_are_checked_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments("c", "--steps=1.5", "--rate=x", "--fast=7") is None
    message = capsys.readouterr().err
    assert message.startswith("4 faults in c and the command line:\n  - --steps: got 1.5; ")
    assert all(part in message for part in ("--rate: got 'x'; ", "--fast: got 7; ", "a.b: got 1"))


def _fail_with(error: Exception) -> int:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main, [])
    return int(stop.value.code or 0)


GIVEN = "given, expected, remedy"


@each(
    "error,message",
    [
        (TokenizerError(GIVEN), f"{GIVEN}\n"),
        (ConfigError([GIVEN], "c"), f"1 fault in c:\n  - {GIVEN}\n"),
        (OSError(GIVEN), f"{GIVEN}\n"),
        (ValueError(GIVEN), f"{GIVEN}\n"),  # raised by a file of the project, as this one is
        (OSError(errno.ENOSPC, "Full", "runs/out"), "runs/out: Full; free some space"),
        (OSError(errno.EIO, "Input/output error", b"a"), "a: Input/output error\n"),
        (OSError(errno.ENOSPC, "Full", "source", None, "copy"), "copy: Full; free some space"),
        (OSError(errno.ENAMETOOLONG, "Too long"), "Too long; give a shorter name"),
    ],
)
def test_mistakes_of_the_user_give_one_message(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fail_with(error) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.out == ""


def test_faults_of_the_program_keep_their_traceback() -> None:
    def of_a_library() -> None:
        json.loads("{")

    def of_ours() -> None:
        raise KeyError("x")

    with pytest.raises(json.JSONDecodeError):
        run(of_a_library, [])
    with pytest.raises(KeyError):
        run(of_ours, [])


def test_a_fault_of_every_rank_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _fail_with(same_on_all_ranks(OSError("everywhere"))) == 2
    assert _fail_with(ConfigError(["the first rank of this host says it"], "c")) == 2
    assert capsys.readouterr().err == ""
    assert _fail_with(OSError("only here")) == 2
    assert capsys.readouterr().err == "[rank 3] only here\n"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert _fail_with(ConfigError(["no such file on this host"], "c")) == 2
    assert capsys.readouterr().err == "[rank 3] 1 fault in c:\n  - no such file on this host\n"


@pytest.mark.more
@each("words,streams,code", [("1e5", ">&-", 0), ("", ">&- 2>&-", 2), ("", "2>/dev/full", 2), ("1e5", "2>&-", 0)])
def test_streams_that_cannot_be_written_do_not_change_the_exit_code(
    tmp_path: Path, words: str, streams: str, code: int
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from relora_mora.commands.pretrain import run_to_the_end\n"
        "def main(a: str) -> int:\n    print(a)\n    return 0\n"
        "run_to_the_end(main)\n"
    )
    shell = f"{sys.executable} {script} {words} {streams}"
    assert subprocess.run(["sh", "-c", shell], capture_output=True, check=False).returncode == code


def test_output_that_is_read_no_more_ends_a_command_without_a_message(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        print("a line")

    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            run(main, [])
    assert ended.value.code == 141
    assert capfd.readouterr().err == ""


PORT = {"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7"}


@each(
    "given,message",
    [
        ({"RANK": "x"}, "RANK=x"),
        ({"RANK": ""}, "RANK= "),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
        ({"WORLD_SIZE": "2.5"}, "WORLD_SIZE=2.5"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "7"}, "not both of MASTER_ADDR and MASTER_PORT"),
        (PORT | {"MASTER_PORT": "0"}, "not both of MASTER_ADDR and MASTER_PORT"),
        ({"DS_ACCELERATOR": "tpu"}, "DS_ACCELERATOR=tpu"),
    ],
)
def test_nonsense_in_the_environment_gives_one_message(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], message: str
) -> None:
    """Ranks other than the first report it too, because no other rank may be running."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    refused(call(PRETRAIN, "nowhere.yaml"), message)
