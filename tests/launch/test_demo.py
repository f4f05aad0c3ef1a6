"""The demo, as far as it can be tried without its text and minutes of training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relora_mora.commands import demo
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
def main():
    demo.step("a step", [sys.executable, "-c", sys.argv[1], sys.argv[2]])
    print("the next step")
run(main, [])
"""


@pytest.mark.more
def test_after_ctrl_c_a_step_has_enough_time_to_save(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DEMO, STEP, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "trains").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=120)
    assert (tmp_path / "saved").exists()
    assert "the next step" not in out
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
    monkeypatch.setattr(demo, "_ranks", lambda: 2)  # this sets variables of the process
    answer = call("demo", *changes)
    assert answer.code == 2
    assert answer.out == ""
    assert all(name in answer.err for name in settings)
    assert str(FOLDER) not in answer.err, "the name of the shipped settings, not their path"
    assert "runs/demo" not in answer.err, "the first steps make these files"
    assert list(tmp_path.iterdir()) == []


def test_a_step_ends_with_the_first_rank_that_fails_and_says_whether_it_continues(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "GRACE_SECONDS", 0.1)
    waits = "import os, sys, time; rank = int(os.environ['RANK']); rank and time.sleep(60); "
    for code, words in (
        (2, ["fault"]),
        (1, ["fault", "code 1", "rm -r"]),
        (75, ["fault", "code 75", "continues", "rm -r"]),
    ):
        waiting = waits if code != 75 else waits.replace("60", "0.3")  # it saves
        script = f"{waiting}print('fault', file=sys.stderr) if rank == 0 else None; sys.exit({code})"
        with pytest.raises(SystemExit) as ended:
            demo.step("a step", [sys.executable, "-c", script], ranks=2)
        message = capfd.readouterr().err + str(ended.value)
        assert [word in message for word in ("fault", "Traceback", "continues")] == [True, False, "continues" in words]
        assert all(word in message for word in words)
        assert (ended.value.code == 2) is (code == 2)
    demo.step("a step", [sys.executable, "-c", "import os; assert os.environ['WORLD_SIZE'] == '2'"], ranks=2)


def test_a_longer_run_is_exported_again(tmp_path: Path) -> None:
    export, checkpoint = tmp_path / "config.json", tmp_path / "latest"
    assert not demo._is_newer(export, checkpoint)
    for file, seconds in ((export, 20), (checkpoint, 10)):
        file.touch()
        os.utime(file, (seconds, seconds))
    assert demo._is_newer(export, checkpoint)
    os.utime(checkpoint, (30, 30))
    assert not demo._is_newer(export, checkpoint)


def test_a_method_without_merges_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "DEMO", tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 200, "eval/perplexity": 150.0}\n', encoding="utf-8")
    demo._report(tmp_path / "run", 173.2)
    said = capsys.readouterr().out
    assert "validation perplexity: step 200: 150.0\n\nLook at the curves" in said
