"""relora-mora tokenize: what it writes, that it continues after a stop, and how it ends."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from relora_mora.config.load import dump
from relora_mora.data.content import content_of
from tests.tools.commands import TOKENIZE, Answer, call, disk, left_in, refused
from tests.tools.data_tools import line, resolve_shards, some_texts, write_shard, write_shards
from tests.tools.pool import Pools
from tests.tools.runs import run_config, write_inputs

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_shards(folder, 5, 40)
    return folder


def make(inputs: Path, out: Path, tokenizer: str, *argv: str, processes: int = 1) -> Answer:
    return call(TOKENIZE, f"{inputs}/*.json.gz", out, f"--tokenizer={tokenizer}", f"--processes={processes}", *argv)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_processes_writes_the_same(
    inputs: Path, tmp_path: Path, tokenizer_path: str, pools: Pools
) -> None:
    others = pools(1)(os.getpid)
    for processes in (1, 2):
        answer = make(inputs, tmp_path / str(processes), tokenizer_path, processes=processes)
        assert (answer.code, answer.err) == (0, "")
        assert "tokens of 200 documents" in answer.out and f"--data.train={tmp_path / str(processes)}" in answer.out
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert left_in(tmp_path / "1") == [".lock", *(f"{number:05d}.arrow" for number in range(5)), "tokens.json"]
    assert pools(1)(os.getpid) == others, "it ended a process of somebody else"


def test_a_second_call_makes_only_missing_files(inputs: Path, tmp_path: Path, tokenizer_path: str) -> None:
    out = tmp_path / "out"
    answer = make(inputs, out, tokenizer_path)
    whole = contents(out)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.arrow") if path.name != "00003.arrow"}
    (out / "00003.arrow").unlink()
    (out / "00003.arrow.tmp").write_bytes(b"of a call that was killed")
    again = make(inputs, out, tokenizer_path)
    assert again.out.partition(" in ")[0] == answer.out.partition(" in ")[0]
    assert contents(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    shutil.copy(out / "00001.arrow", out / "00000.arrow")
    assert make(inputs, out, tokenizer_path).code == 0
    with pytest.raises(ValueError, match=r"00000\.arrow has changed since its tokens were made"):
        content_of(resolve_shards(str(out)))


def test_a_folder_of_something_else_is_refused(
    inputs: Path, tmp_path: Path, tokenizer_path: str, other_tokenizer: str
) -> None:
    out = tmp_path / "out"
    text = tmp_path / "text"
    shutil.copytree(inputs, text)
    assert make(text, out, tokenizer_path).code == 0
    whole = contents(out)
    refused(make(text, out, other_tokenizer), f"{out} holds tokens of another text", "give another folder")
    refused(make(text, out, tokenizer_path, "--data.max_line_bytes=99"), "by another tokenizer or with other settings")
    write_shard(text / "part-00002.json.gz", some_texts(40, seed=99))
    refused(make(text, out, tokenizer_path), f"{out} holds tokens of another text, or of this text before it changed")
    refused(make(inputs, text, tokenizer_path), f"{text}: exists and holds something else")
    refused(call(TOKENIZE, out, tmp_path / "x", f"--tokenizer={tokenizer_path}"), f"{out} holds tokens already")
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(make(inputs, out, tokenizer_path), "another command is making its tokens")
    assert contents(out) == whole


def test_settings_of_a_run_give_text_tokenizer_and_limits(tmp_path: Path, tokenizer_path: str) -> None:
    folder = write_inputs(tmp_path)
    settings = run_config(folder, tokenizer_path, folder / "run", data={"max_line_bytes": 12345})
    (folder / "run.yaml").write_text(dump(settings))
    for split in ("train", "validation"):
        answer = call(TOKENIZE, folder / "run.yaml", tmp_path / f"{split}.tokens", f"--split={split}", "--processes=1")
        assert answer.code == 0
        assert f"--data.{split}=" in answer.out
        shards = resolve_shards(str(tmp_path / f"{split}.tokens"))
        assert [shard.tokens.text.name for shard in shards if shard.tokens] == left_in(folder / split)
        assert {shard.tokens.making.max_line_bytes for shard in shards if shard.tokens} == {12345}


def test_unusable_text(tmp_path: Path, tokenizer_path: str) -> None:
    """What was finished stays, and a call that forgives more goes on."""
    write_shard(tmp_path / "0.json", [line("a text")])
    write_shard(
        tmp_path / "1.json", [*[line("a text")] * 30, *[b"no JSON"] * 11]
    )  # after the lines that are checked first
    argv = [f"{tmp_path}/*.json", tmp_path / "out", f"--tokenizer={tokenizer_path}"]
    refused(call(TOKENIZE, *argv, "--processes=2"), "1.json: 11 of 41 lines are bad, more than data.max_bad_fraction")
    assert "00001.arrow" not in left_in(tmp_path / "out")
    answer = call(TOKENIZE, *argv, "--data.max_bad_fraction=0.5", "--processes=1")
    assert answer.code == 0
    assert "11 of 42 rows were bad and skipped" in answer.out


def test_a_full_disk(inputs: Path, tmp_path: Path, tokenizer_path: str) -> None:
    with disk(tmp_path / "disk", "size=24k") as folder:
        refused(make(inputs, folder / "out", tokenizer_path), f"{folder / 'out'}", "No space left on device; free some")
        assert not [name for name in left_in(folder / "out") if name.endswith(".tmp")]


# ---- the end of a command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def much_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small shards, then large ones."""
    folder = tmp_path_factory.mktemp("much")
    texts = some_texts(1000, words=200)
    for number in range(4):
        write_shard(folder / f"{number}.json", texts[:20] if number < 2 else texts * 2)
    return folder


@pytest.mark.stops
def test_ctrl_c_keeps_finished_files(much_text: Path, tmp_path: Path, tokenizer_path: str) -> None:
    out = tmp_path / "out"
    argv = [TOKENIZE, f"{much_text}/*.json", str(out), f"--tokenizer={tokenizer_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "relora_mora", *argv, "--processes=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while True:
        assert process.poll() is None, process.communicate()
        children = psutil.Process(process.pid).children()
        with contextlib.suppress(psutil.NoSuchProcess):  # one may have ended already
            workers = [child for child in children if "spawn_main" in "".join(child.cmdline())]
            for worker in workers:
                worker.suspend()  # otherwise they may have finished before the signal
            if list(out.glob("*.arrow")) and list(out.glob("*.arrow.tmp")):
                break
            for worker in workers:
                worker.resume()
        time.sleep(0.01)
    finished = {path.name for path in out.glob("*.arrow")}
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert not psutil.wait_procs(children, timeout=30)[1]
    left = set(left_in(out))
    assert left >= finished | {"tokens.json"}
    assert not any(name.endswith(".tmp") for name in left)
    with pytest.raises(ValueError, match="its tokens are not finished"):
        resolve_shards(str(out))
    answer = call(*argv, "--processes=1")
    assert answer.code == 0
    assert len(resolve_shards(str(out))) == 4
