"""The demo, as far as it can be tried without its text and minutes of training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relora_mora.commands import demo
from relora_mora.commands.pretrain import train
from relora_mora.config.shipped import FOLDER
from tests.tools.commands import call
from tests.tools.each import each
from tests.tools.helpers import ROOT

STEP = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), Path(sys.argv[1], "saved").touch(), sys.exit(75)))
Path(sys.argv[1], "trains").touch()
time.sleep(60)
"""
DEMO = """
import sys
from relora_mora.commands import demo
from relora_mora.cli.command import run
demo.ending_with_me = lambda words: [sys.executable, "-c", *words[-2:]]
def main():
    demo.step("a step", ["stand-in", *sys.argv[1:]])
    print("the next step")
run(main, [])
"""


@pytest.mark.more
def test_after_ctrl_c_a_step_has_enough_time_to_save(tmp_path: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", DEMO, STEP, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    while not (tmp_path / "trains").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=120)
    assert (tmp_path / "saved").exists() and "the next step" not in out
    assert process.returncode == 130
    assert err.startswith("stopped; the same command continues from here")


@each(
    "changes,settings",
    [
        (["--train.steps=0", "--optim.warmup_step=3"], ["train.steps: ", "optim.warmup_step: "]),
        (["--data.sequence_length=100000"], ["data.sequence_length: "]),
        (["--data.train=nothing.txt", "--optim.matrices=nothing.py:Rule"], ["nothing.py"]),
        (["--data.train=nothing.txt"], ["data.train: "]),
    ],
)
def test_a_mistake_in_the_settings_is_reported_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], settings: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = call("demo", *changes)
    assert (answer.code, answer.out) == (2, "")
    assert all(name in answer.err for name in settings)
    assert str(FOLDER) not in answer.err, "the name of the shipped settings, not their path"
    assert "runs/demo" not in answer.err, "the first steps make these files"
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_ends_the_demo_and_says_whether_it_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "ending_with_me", lambda words: [sys.executable, "-c", f"raise SystemExit({words[-1]})"])
    demo.step("a step", ["0"])
    for code, words in ((2, []), (1, ["code 1", "rm -r"]), (75, ["code 75", "continues", "rm -r"])):
        with pytest.raises(SystemExit) as ended:
            demo.step("a step", [str(code)])
        said = capsys.readouterr().err
        assert ended.value.code == (2 if code == 2 else 1), "a number, with which every command can leave at once"
        assert all(word in said for word in words)
        assert ("continues" in said) == ("continues" in words)


def test_a_method_without_merges_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "DEMO", tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 200, "eval/perplexity": 150.0}\n', encoding="utf-8")
    demo._report(tmp_path / "run")
    said = capsys.readouterr().out
    assert "validation perplexity: step 200: 150.0\n\nLook at the curves" in said


def test_a_run_names_the_next_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("relora_mora.train.begin.files.check_files", lambda config: None)
    monkeypatch.setattr("relora_mora.train.pretrain.pretrain", lambda settings, guard: 0)
    assert train("tiny_remora", {}) == 0
    assert "next:" in capsys.readouterr().err
