"""What a command writes is whole or absent, on any disk."""

import os
import stat
from pathlib import Path

import pytest

from relora_mora.system.files import new_folder
from tests.tools.commands import TRAIN, Answer, call, disk, left_in, refused
from tests.tools.data_tools import write_shards

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_shards(folder, 2, 60)
    return folder


def write_output(inputs: Path, out: Path) -> Answer:
    """A command that would write ``out``, with good input."""
    return call(TRAIN, f"--data={inputs}/*.json.gz", f"--out={out}", "--vocab_size=310")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    for out in (tmp_path / "new" / "folder", tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("target")
        with new_folder(out) as work:
            (work / "file").write_text("content")
            assert not out.exists()
        assert (out / "file").read_text() == "content"
    assert left_in(tmp_path) == ["link", "new", "target"]
    assert left_in(tmp_path / "new") == ["folder"]
    mask = os.umask(0o027)
    with new_folder(tmp_path / "masked"):
        pass
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "masked").stat().st_mode) == 0o750


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for error in (KeyError("a fault of the program"), OSError(2, "another", "/elsewhere"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, new_folder(tmp_path / "empty") as work:
            (work / "file").write_text("content")
            raise error
        assert caught.value is error
    assert (left_in(tmp_path), left_in(tmp_path / "empty")) == (["empty"], [])


def test_output_that_cannot_be_made(inputs: Path, tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "loop").symlink_to("loop")
    for out, message in {
        occupied: "remove it",
        tmp_path / "file": "remove it",
        tmp_path / "loop": "remove it",
        tmp_path / "file" / "below": "File exists",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        refused(write_output(inputs, out), str(out.parent), message)
    assert left_in(tmp_path) == ["file", "loop", "occupied"]
    assert (occupied / "mine").read_text() == (tmp_path / "file").read_text() == "keep"


def test_disks_that_are_full_or_read_only(inputs: Path, tmp_path: Path) -> None:
    """At any size the folder is whole or absent, and nothing is left."""
    assert write_output(inputs, tmp_path / "good").code == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    need = sum(-(-len(content) // 4096) * 4096 for content in whole.values())
    for size in (4096, need // 2, need - 4096):
        with disk(tmp_path / "disk", f"size={size}") as folder:
            refused(write_output(inputs, folder / "out"), f"{folder / 'out'}: No space left on device")
            assert left_in(folder) == []
    with disk(tmp_path / "disk", f"size={4 * need}") as folder:
        assert write_output(inputs, folder / "out").code == 0
        assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == whole
    with disk(tmp_path / "disk", "size=1m") as folder:
        refused(write_output(inputs, folder), f"{folder}: is a mount point")
    with disk(tmp_path / "disk", "ro") as folder:
        refused(write_output(inputs, folder / "out"), f"{folder}/.out-", "Read-only file system")
