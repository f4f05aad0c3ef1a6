"""Ctrl-C and other signals end a command with one message, whatever it is doing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from relora_mora.cli.command import run
from tests.tools.each import each


def test_ctrl_c_shows_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        signal.raise_signal(signal.SIGINT)

    def hidden() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:  # as libraries do
            raise RuntimeError("INTERNAL") from error

    for function in (main, hidden):
        with pytest.raises(SystemExit) as stop:
            run(function, [])
        assert (stop.value.code, capsys.readouterr().err) == (130, "interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1


def _ended_inside_a_folder(tmp_path: Path, code: str) -> tuple[int, str]:
    """Exit code and errors of a command that gets Ctrl-C while ``code`` runs; its temporary folder must be gone."""
    script = tmp_path / "script.py"
    script.write_text(
        "import hashlib, time\nfrom pathlib import Path\n"
        "import relora_mora.cli.command\nfrom relora_mora.cli.command import run\n"
        "from relora_mora.system.files import new_folder\n"
        "relora_mora.cli.command.GRACE_SECONDS = 0.5\n"
        f"def main() -> None:\n  with new_folder(Path({str(tmp_path / 'out' / 'new')!r})):\n"
        f"    Path({str(tmp_path / 'inside')!r}).touch()\n    {code}\nrun(main)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "inside").exists():
        assert process.poll() is None
        time.sleep(0.02)
    used = psutil.Process(process.pid).cpu_times().user
    while "pbkdf2" in code and psutil.Process(process.pid).cpu_times().user < used + 0.2:
        time.sleep(0.02)  # before, Python itself would still hear the signal
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert list((tmp_path / "out").iterdir()) == []
    return process.returncode, error


@pytest.mark.more
@each(
    "code",
    [
        "try:\n        time.sleep(60)\n    except KeyboardInterrupt:\n        time.sleep(60)",  # as imports do
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",  # as libraries do that compute for minutes
    ],
)
def test_ctrl_c_ends_code_that_swallows_it(tmp_path: Path, code: str) -> None:
    assert _ended_inside_a_folder(tmp_path, code) == (130, "interrupted\n")


def test_a_signal_handler_of_the_command_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[int] = []

    def main() -> int:
        signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
        signal.raise_signal(signal.SIGINT)
        return 75

    try:
        with pytest.raises(SystemExit) as stop:
            run(main, [])
        assert (stop.value.code, heard, capsys.readouterr().err) == (75, [signal.SIGINT], "")
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
