"""A run in an object store: what is sent, what comes back, and what happens if the store fails or has another owner."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from relora_mora.checkpoint import mirror
from relora_mora.checkpoint.layout import file_entry
from relora_mora.checkpoint.mirror import MirrorError
from tests.tools.mirrors import URL, checkpoint, opened, sent, wait_for

STORE = MemoryFileSystem()


@pytest.fixture(autouse=True)
def empty_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, seconds in (("BEAT_SECONDS", 0.05), ("SILENCE_SECONDS", 0.3), ("FIRST_WAIT_SECONDS", 0.01)):
        monkeypatch.setattr(mirror, name, seconds)
    for name in ("POLL_SECONDS", "LONGEST_WAIT_SECONDS"):
        monkeypatch.setattr(mirror, name, 0.01)
    yield
    STORE.store.clear()
    STORE.pseudo_dirs[:] = [""]


def names(folder: str) -> list[str]:
    return sorted(path.rpartition("/")[2] for path in STORE.find(f"/bucket/run/{folder}"))


@pytest.mark.parametrize("url", [URL, "PATH", "file://PATH"])
def test_a_run_goes_on_from_the_store_alone(tmp_path: Path, url: str) -> None:
    url = url.replace("PATH", str(tmp_path / "a store"))
    sent(tmp_path / "run", 5, 10, url=url)
    shutil.rmtree(tmp_path / "run")
    again = opened(tmp_path / "run", url=url)
    again.claim()
    assert again.fetch() == 10
    assert (tmp_path / "run/checkpoints/step-00000010/state").read_text().startswith("10 ")
    assert (tmp_path / "run/checkpoints/step-00000010/tokenizer/t.json").read_text() == "{}"
    assert (tmp_path / "run/metrics.jsonl").read_text() == "10\n"
    assert again.fetch() is None  # the run folder has it now


def test_the_store_keeps_what_the_disk_keeps_and_each_file_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sent(run, 5)
    state = file_entry(run / "checkpoints/step-00000005/state").xxh3_128
    assert state in names("files")
    assert len(names("files")) == 3
    shutil.rmtree(run / "checkpoints/step-00000005")
    sent(run, 10)
    assert names("manifests") == ["step-00000010.json"]
    assert state not in names("files")
    assert len(names("files")) == 3  # base and tokenizer are those of step 5
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_another_machine_has_and_keeps_what_the_first_one_kept(tmp_path: Path) -> None:
    """Step 2 was the best, step 6 is kept for its interval, and step 8 the one to go back to from step 10."""
    kept = {"checkpoint": {"keep_every_steps": 3}}
    for step in (2, 6, 7, 8):
        sent(tmp_path / "first", step, config=kept)
    sent(tmp_path / "first", 10, config=kept, counters={"bad_steps": 1, "best": {"step": 2}})
    second = opened(tmp_path / "second")
    second.claim()
    assert second.fetch() == 10
    assert sorted(path.name[-2:] for path in (tmp_path / "second/checkpoints").iterdir()) == ["02", "08", "10"]
    second.start()
    checkpoint(tmp_path / "second", 12, config=kept)
    second.close()
    assert [name[-7:-5] for name in names("manifests")] == ["02", "06", "08", "10", "12"]
    shutil.rmtree(tmp_path / "second/checkpoints")  # a new history, which goes back to step 3
    sent(tmp_path / "second", 3, config=kept)
    assert names("manifests") == ["step-00000003.json"]


def test_a_step_that_is_made_again_after_a_rollback_is_sent_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = opened(run)
    trainer.claim()
    trainer.start()
    for base in ("before", "after"):
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        new = checkpoint(tmp_path / base, 5, base=base)
        digest = file_entry(new / "base").xxh3_128
        shutil.copytree(new.parent, run / "checkpoints")
        wait_for(lambda digest=digest: digest in names("files"))
    trainer.close()


def test_faults_are_reported_and_repeated_and_nothing_incomplete_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each request fails once: it is refused, or a file arrives cut short."""
    run = tmp_path / "run"
    trainer = opened(run)
    trainer.claim()
    seen, there = set[str](), list[int]()
    cut = tmp_path / "cut"
    cut.write_text("")
    for name in ("put_file", "pipe_file", "info"):
        whole = getattr(MemoryFileSystem, name)

        def failing(self: Any, *given: Any, whole: Any = whole, name: str = name, **named: Any) -> Any:
            request = f"{name} {given[:2]}"
            if "manifests" in request:
                there.append(sum("/files/" in path for path in STORE.store))
            if request not in seen:
                seen.add(request)
                if name != "put_file":
                    raise PermissionError(13, "expired token")
                given = (str(cut), *given[1:])
            return whole(self, *given, **named)

        monkeypatch.setattr(MemoryFileSystem, name, failing)
    checkpoint(run, 5)
    trainer.start()
    wait_for(lambda: names("manifests"))
    monkeypatch.undo()
    trainer.close()
    assert set(there) == {3}  # all files came before the manifest
    assert any("training goes on" in line for line in caplog.messages)
    shutil.rmtree(run)
    again = opened(run)
    again.claim()
    assert again.fetch() == 5


def test_only_the_newest_checkpoint_waits_for_a_slow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    trainer = opened(run)
    trainer.claim()
    free = begun = False
    whole = MemoryFileSystem.put_file

    def slow(self: Any, *given: Any, **named: Any) -> Any:
        nonlocal begun
        begun = True
        wait_for(lambda: free)
        return whole(self, *given, **named)

    monkeypatch.setattr(MemoryFileSystem, "put_file", slow)
    checkpoint(run, 5)
    trainer.start()
    wait_for(lambda: begun)
    for step in (10, 15, 20):
        checkpoint(run, step)
    shutil.rmtree(run / "checkpoints/step-00000005")  # while it is sent
    free = True
    wait_for(lambda: names("manifests") == ["step-00000020.json"])
    trainer.close()


def test_damage_in_the_store_is_passed_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sent(run, 5)
    sent(run, 10)
    broken = file_entry(run / "checkpoints/step-00000010/state").xxh3_128
    STORE.pipe_file(f"/bucket/run/files/{broken}", b"xx")
    shutil.rmtree(run)
    again = opened(run)
    again.claim()
    assert again.fetch() == 5
    STORE.rm("/bucket/run/files", recursive=True)
    shutil.rmtree(run)
    with pytest.raises(MirrorError, match="no checkpoint in it is whole"):
        again.fetch()


def test_a_store_that_fails_while_a_checkpoint_is_fetched_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    sent(run, 5, 10)
    shutil.rmtree(run)
    again = opened(run)
    again.claim()

    def away(*given: Any, **named: Any) -> None:
        raise PermissionError(13, "expired token")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", away)
        with pytest.raises(MirrorError, match="expired token"):
            again.fetch()
    assert again.fetch() == 10


def test_a_second_trainer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    first.claim()
    first.start()
    with pytest.raises(MirrorError, match="another trainer"):
        second.claim()
    first.close()
    second.claim()


def test_a_trainer_that_was_killed_is_waited_for_once(tmp_path: Path) -> None:
    opened(tmp_path / "a").claim()  # and never a beat
    begin = time.monotonic()
    opened(tmp_path / "a").claim()  # the lock of this run folder says that it is gone
    assert time.monotonic() - begin < 0.3
    opened(tmp_path / "b").claim()
    assert time.monotonic() - begin >= 0.3


@pytest.mark.parametrize("sees_it", ["the beat", "the last save"])
def test_a_trainer_that_lost_the_mirror_sends_nothing_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sees_it: str
) -> None:
    first = opened(tmp_path / "a")
    first.claim()
    STORE.pipe_file("/bucket/run/owner.json", json.dumps({"token": "another", "host": "h"}).encode())
    checkpoint(tmp_path / "a", 5)
    if sees_it == "the beat":
        first._pulse.start()
        first._pulse.join(60)
    else:
        first._closing.set()
        first.start()
        first.close()
    assert names("manifests") == []
    assert "another trainer has taken it" in caplog.messages[0]
    assert json.loads(STORE.cat_file("/bucket/run/owner.json"))["token"] == "another"


def test_the_mirror_of_another_run_or_of_later_steps_is_refused_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "starts.jsonl").write_text(f"{name}\n")
    sent(tmp_path / "a", 10)
    checkpoint(tmp_path / "b", 15)
    for name, step, fault in (("a", 10, None), ("a", 5, "at step 10"), ("b", 15, "another run")):
        shutil.rmtree(tmp_path / name / "checkpoints")
        checkpoint(tmp_path / name, step)
        trainer = opened(tmp_path / name)
        trainer.claim()
        with pytest.raises(MirrorError, match=fault) if fault else contextlib.nullcontext():
            assert trainer.fetch() is None
    assert names("manifests") == ["step-00000010.json"]


def test_the_same_command_goes_on_from_the_mirror(tmp_path: Path) -> None:
    """A run that began with the checkpoint of another one does not begin there again."""
    sent(tmp_path / "a", 10, config={"train": {"resume": "runs/other"}})
    again = opened(tmp_path / "b")
    again.claim()
    for resume in ("never", "runs/another"):
        with pytest.raises(MirrorError, match=f"train.resume={resume}"):
            again.fetch(resume)
    assert again.fetch("runs/other") == 10


@pytest.mark.parametrize("url", ["nonsense://bucket/run", "gs://bucket/run"])
def test_a_store_that_cannot_be_opened_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(MirrorError, match=r"checkpoint\.mirror"):
        opened(tmp_path, url=url).claim()
