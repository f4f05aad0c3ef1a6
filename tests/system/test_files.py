"""Small files are written whole or not at all; what is removed is never what a link points to."""

import errno
import os
from pathlib import Path

import pytest

from relora_mora.system.files import append_synced, disk_faults_named, place_of, remove, sync, write_synced
from tests.tools.each import each

FULL = errno.ENOSPC
MISSING = errno.ENOENT


def _full(handle: int) -> None:
    raise OSError(FULL, "No space left on device")


def test_a_failed_write_does_not_change_the_file_and_names_it(tmp_path, monkeypatch):
    """The system does not name the file if a write fails."""
    path = tmp_path / "latest"
    write_synced(path, "before")
    monkeypatch.setattr(os, "fsync", _full)
    for write in (write_synced, append_synced):
        with pytest.raises(OSError, match="No space") as caught:
            write(path, "after")
        assert place_of(caught.value) == str(path)
        if write is write_synced:
            assert path.read_text() == "before"
        assert list(tmp_path.iterdir()) == [path]


def test_a_line_is_appended_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "ends.jsonl"
    append_synced(path, "before")
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, line: write(handle, line[:3]))
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        append_synced(path, "after")
    assert path.read_text() == "before\n"


def test_processes_can_write_one_file_at_the_same_time(tmp_path, monkeypatch):
    path = tmp_path / "latest"

    def meanwhile(handle: int) -> None:
        monkeypatch.undo()
        write_synced(path, "other")
        assert path.read_text() == "other"

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_synced(path, "own")
    assert path.read_text() == "own"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_removed_without_its_target(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    for name, target in (("folder", "theirs"), ("file", "theirs/file"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / target)
        remove(tmp_path / name)
    remove(tmp_path / "nothing")
    assert [path.name for path in tmp_path.rglob("*")] == ["theirs", "file"]


@each(
    "error,place",
    [
        (OSError(FULL, "No space"), "out"),  # a write names no file
        (OSError(MISSING, "No such file"), None),  # but this was no write
        (OSError(FULL, "No space", "elsewhere"), "elsewhere"),
        (OSError(FULL, "No space", "source", None, "target"), "target"),  # a copy is about its target
        (Exception("I/O error: No space left on device (os error 28)"), "out"),  # safetensors
        (ValueError("(os error 28)"), None),
        (Exception("(os error 2)"), None),
    ],
)
def test_an_error_of_the_disk_names_a_file(error, place):
    with pytest.raises(type(error) if place is None else OSError) as caught, disk_faults_named(Path("out")):
        raise error
    assert place is None or place_of(caught.value) == place
    assert (caught.value is error) is (place != "out")


def test_a_file_system_that_cannot_flush_folders(tmp_path, monkeypatch):
    def refused(handle):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refused)
    sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")
