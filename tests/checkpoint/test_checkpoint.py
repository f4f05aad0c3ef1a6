"""The files of a checkpoint: complete, damaged, from a stranger, and after a kill."""

import errno
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from relora_mora.checkpoint.layout import CheckpointError, abandon, discard, list_checkpoints
from relora_mora.checkpoint.reader import CheckpointReader, find_checkpoint, first_whole, newest_manifest, verify
from relora_mora.checkpoint.writer import tidy
from relora_mora.config.load import validate
from relora_mora.config.schema import Config
from relora_mora.train.state.resume import where_to_resume
from tests.checkpoint.tools import FILES, STATE, TOKENIZER, passed_over, rewrite
from tests.tools.config_tools import tree
from tests.tools.each import each
from tests.tools.runs import checkpoint_at


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


WAYS: list[Callable[[Path], Any]] = [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    _flip,
    lambda path: path.write_bytes(b""),
    lambda path: (path.unlink(), path.mkdir()),
    lambda path: (path.unlink(), os.mkfifo(path)),
]


@each("way", WAYS)
@each("file", [STATE, FILES[2], TOKENIZER[1], "manifest.json"])
def test_a_damaged_checkpoint_is_skipped_for_an_older_one_and_named(made, tmp_path, caplog, file, way):
    folder = shutil.copytree(made, tmp_path / "checkpoints")
    way(folder / "step-00000015" / file)
    assert find_checkpoint(folder) == folder / "step-00000010"
    [line] = caplog.messages
    assert line.startswith(f"passed over {folder}/step-00000015")
    assert file in line


@each("name", ["manifest.json", STATE])
def test_a_network_file_system_that_is_gone_is_not_damage(made, tmp_path, monkeypatch, name):
    """Otherwise the run would go back to an older checkpoint and put the newest one aside."""
    folder = shutil.copytree(made, tmp_path / "checkpoints")
    read = Path.open

    def stale(path: Path, *args: Any, **settings: Any) -> Any:
        if path.name == name and path.parent.name.startswith("step-00000015"):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path, *args, **settings)

    before = sorted(folder.iterdir())
    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(OSError, match="Stale"):
        find_checkpoint(folder)
    assert sorted(folder.iterdir()) == before


def test_a_run_resumes_its_own_checkpoints_unless_it_goes_back(folder):
    assert newest_manifest(folder).step == 15
    run_dir = folder / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(folder)
    with pytest.raises(CheckpointError, match=r"holds checkpoints, and train\.resume=never"):
        where_to_resume(_resuming("never", run_dir))
    assert where_to_resume(_resuming("auto", run_dir)) == run_dir / "checkpoints"
    own = checkpoint_at(run_dir, 15)
    (run_dir / "link").symlink_to(own)
    for name in (own, run_dir / "link"):
        assert where_to_resume(_resuming(str(name), run_dir)) == name, "to go back to it"
    with pytest.raises(CheckpointError, match=r"names no best checkpoint; .*checkpoint\.keep_best"):
        where_to_resume(_resuming(str(run_dir / "best"), run_dir))
    (folder / "best").write_text(own.name)
    for run in (run_dir, folder.parent / "another"):
        assert where_to_resume(_resuming(str(run_dir / "best"), run)) == own
    assert newest_manifest(run_dir / "best").step == 15
    for name in (run_dir, run_dir / "checkpoints", folder):
        assert where_to_resume(_resuming(str(name), run_dir)) == run_dir / "checkpoints", "as auto"
    (run_dir / "of-another-stage").mkdir()
    with pytest.raises(CheckpointError, match="holds checkpoints of a start that did not begin there"):
        where_to_resume(_resuming(str(run_dir / "of-another-stage"), run_dir))


def _resuming(name: str, run_dir: Path) -> Config:
    return validate(tree(train={"run_dir": str(run_dir), "resume": name}), "the test")


def test_a_folder_is_distinguished_from_the_word_auto(tmp_path):
    assert where_to_resume(_resuming("auto", tmp_path)) is None
    with pytest.raises(CheckpointError, match="auto: not found; give a run folder"):
        where_to_resume(_resuming("./auto", tmp_path))


@each("place", ["..", "."])
@each("link", [STATE, "manifest.json", "tokenizer", "tokenizer/tokenizer.model"])
def test_a_link_is_not_a_file_of_a_checkpoint(made, tmp_path, link, place):
    folder = shutil.copytree(made, tmp_path / "checkpoints")
    newest = folder / "step-00000015"
    file = newest / link
    elsewhere = newest / place / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere.resolve())
    assert passed_over(folder).startswith(link)


def test_a_checkpoint_folder_may_be_a_link(folder):
    (folder / "another disk").mkdir()
    (folder / "step-00000015").rename(folder / "another disk" / "step-00000015")
    (folder / "step-00000015").symlink_to(folder / "another disk" / "step-00000015")
    assert first_whole(list_checkpoints(folder)) == (folder / "step-00000015", [])


def _pieces(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / STATE)
        change(tensors)
        save_file(tensors, checkpoint / STATE)
        rewrite(checkpoint, lambda values: None)

    return damage


def _coded(codes: torch.Tensor) -> Callable[[Path], None]:
    """Adds codes for the moments of a matrix."""

    def damage(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / STATE) | {"exp_avg_codes|a|0": codes}
        save_file(tensors, checkpoint / STATE)
        rewrite(checkpoint, lambda values: values.update(matrix_states={"a": {"exp_avg_codes": [4, 3]}}))

    return damage


CONTENTS: list[tuple[Callable[[Path], Any], str]] = [
    (_pieces(lambda t: t.update({"master|a|0": torch.zeros(7)})), "12 elements of master of a once"),
    (_pieces(lambda t: t.update({"master|a|5": torch.zeros(7)})), "12 elements of master of a once"),
    (_pieces(lambda t: t.update({"master|a|8": t.pop("master|a|7")})), "12 elements of master of a once"),
    (_pieces(lambda t: t.pop("exp_avg|b|0")), "2 elements of exp_avg of b once"),
    (_pieces(lambda t: t.update({"exp_avg_sq|b|0": torch.zeros(1)})), "2 elements of exp_avg_sq of b once"),
    (_pieces(lambda t: t.update({"master|b|2": torch.zeros(3)})), "2 elements of master of b once"),
    (_pieces(lambda t: t.update({"master|b|0": torch.zeros(2).bfloat16()})), "(BF16) is not an F32 piece"),
    (_pieces(lambda t: t.update({"master|c|0": torch.zeros(2)})), "master|c|0 (F32) is not an F32 piece"),
    (_pieces(lambda t: t.update({"master|b|-1": torch.zeros(2)})), "is not an F32 piece"),
    (_pieces(lambda t: t.update({"b": torch.zeros(2)})), "is not an F32 piece"),
    (_coded(torch.zeros(4, 3)), "exp_avg_codes|a|0 (F32) is not an I8 piece"),
    (_coded(torch.zeros(4, 3, dtype=torch.uint8)), "exp_avg_codes|a|0 (U8) is not an I8 piece"),
    (_coded(torch.zeros(4, 2, dtype=torch.int8)), "12 elements of exp_avg_codes of a once"),
    (lambda path: (torch.save({"a": 1}, path / STATE), rewrite(path, lambda values: None)), "cannot be read"),
]


@each("damage,says", CONTENTS)
def test_pieces_make_up_every_parameter_once(made, tmp_path, damage, says):
    folder = shutil.copytree(made, tmp_path / "checkpoints")
    damage(folder / "step-00000015")
    assert says in passed_over(folder)
    with pytest.raises(CheckpointError, match="use an older checkpoint"):
        CheckpointReader(folder / "step-00000015")


@each("key", ["master|a|7", "exp_avg|b|0", "exp_avg_sq|b|0"])
def test_numbers_that_are_not_finite_are_not_read(made, tmp_path, key):
    """Although their checksum is right: no resume, export, evaluation or warm start may use them."""
    folder = shutil.copytree(made, tmp_path / "checkpoints")
    kind, name, _ = key.split("|")
    _pieces(lambda tensors: tensors[key].reshape(-1)[-1:].fill_(math.inf))(folder / "step-00000015")
    reader = CheckpointReader(folder / "step-00000015")
    with pytest.raises(
        CheckpointError, match=f"{kind} of {name} holds numbers that are not finite; use an older checkpoint"
    ):
        reader.piece(kind, name, 0, reader.manifest.numel(name))
    assert reader.piece(kind, name, 0, 1).isfinite().all()  # only the last element is damaged


def test_other_names_are_not_checkpoints(tmp_path):
    others = (
        "step-00000010.tmp",
        "step-00000011.old",
        "step-00000012.new",
        "best",
        "step-x",
        "step-00000²",
        "step-13",
        "abandoned-step-00000014",
    )
    for name in ("step-00000005", "step-123456789", *others):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-123456789", "step-00000005"]
    assert list_checkpoints(tmp_path / "none") == []


def test_removal_does_not_follow_links(folder):
    (folder / "elsewhere").mkdir()
    (folder / "step-00000005").rename(folder / "elsewhere" / "step-00000005")
    for name in ("step-00000005", "step-00000006.2.tmp"):
        (folder / name).symlink_to(folder / "elsewhere" / "step-00000005")
    (folder / "latest.1a2b3c4d.tmp").write_text("of a kill")
    discard(folder / "step-00000005")
    tidy(folder)
    verify(folder / "elsewhere" / "step-00000005")
    assert {path.name for path in folder.iterdir()} == {"elsewhere", "step-00000010", "step-00000015"}


def test_an_abandoned_checkpoint_keeps_its_content_under_a_new_name(folder):
    for number in ("", "2-", "3-"):
        checkpoint = folder / "step-00000015"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "mark").write_text(number)
        abandon(checkpoint)
        assert (folder / f"abandoned-{number}step-00000015" / "mark").read_text() == number
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000010", "step-00000005"]
    verify(folder / "abandoned-step-00000015")
