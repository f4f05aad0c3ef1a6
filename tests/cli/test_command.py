"""Command lines: raw text, every mistake before anything starts, one message and no traceback."""

from __future__ import annotations

import errno
import json
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


class Called:
    """A ``main`` like the one of launch/pretrain.py that remembers its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def pretrain(self, argv: list[str]) -> int:
        def main(
            config: str, *, steps: int | None = None, rate: float = 0.5, fast: bool = False, **overrides: str
        ) -> int:
            """Trains.

            Args:
                config: the settings
            """
            self.calls.append((config, steps, rate, fast, overrides))
            return 75

        return self._exit(main, argv)

    @staticmethod
    def _exit(main: object, argv: list[str]) -> int:
        with pytest.raises(SystemExit) as stop:
            run(main, argv)  # type: ignore[arg-type]
        return int(stop.value.code or 0)


def test_text_arrives_as_typed() -> None:
    called = Called()
    assert called.pretrain(["1e5", "--optim.lr=4e-4", "--a.a=a,b", "--a.b", "x y", "--c.d=-1", "--e.f=a=b"]) == 75
    overrides = {"optim.lr": "4e-4", "a.a": "a,b", "a.b": "x y", "c.d": "-1", "e.f": "a=b"}
    assert called.calls == [("1e5", None, 0.5, False, overrides)]


def test_annotated_parameters_are_parsed_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    called = Called()
    assert called.pretrain(["c", "--steps=12", "--rate=1", "--fast"]) == 75
    assert called.calls == [("c", 12, 1.0, True, {})]
    assert called.pretrain(["c", "--steps=null", "--rate=1e-3", "--fast=false"]) == 75
    assert called.calls[1] == ("c", None, 1e-3, False, {})
    assert called.pretrain(["c", "--steps=1.5", "--rate=x", "--fast=7"]) == 2
    message = capsys.readouterr().err
    assert len(called.calls) == 2
    assert all(part in message for part in ("--steps: got '1.5', expected int", "--rate: got 'x'", "--fast: got '7'"))


@each("flag", [["--local_rank=1"], ["--local-rank=1"]])
@each("first", [True, False])
def test_the_launchers_local_rank_is_dropped(flag: list[str], first: bool) -> None:
    called = Called()
    argv = [*flag, "c", "--a.b=1"] if first else ["c", "--a.b=1", *flag]
    assert called.pretrain(argv) == 75
    assert called.calls == [("c", None, 0.5, False, {"a.b": "1"})]


def _fail_with(error: Exception) -> int:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main, [])
    return int(stop.value.code or 0)


@each(
    "error",
    [
        TokenizerError("given, expected, remedy"),
        ConfigError(["given, expected, remedy"], "c"),
        OSError("given, expected, remedy"),
        ValueError("given, expected, remedy"),  # raised by a file of the project, as this one is
    ],
)
def test_mistakes_of_the_user_give_one_message(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert _fail_with(error) == 2
    captured = capsys.readouterr()
    assert captured.err == f"{error}\n"
    assert captured.out == ""


def test_errors_of_the_system_name_the_file_and_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    for error, message in {
        OSError(errno.ENOSPC, "Full", "runs/out"): "runs/out: Full; free some space",
        OSError(errno.EIO, "Input/output error", b"a"): "a: Input/output error\n",
        OSError(errno.ENOSPC, "Full", "source", None, "copy"): "copy: Full; free some space",
        OSError(errno.ENAMETOOLONG, "Too long"): "Too long; give a shorter name",
    }.items():
        assert _fail_with(error) == 2
        assert capsys.readouterr().err.startswith(message)


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
