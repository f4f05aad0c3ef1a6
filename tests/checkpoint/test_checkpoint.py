"""Checkpoints in a folder: which one is found, named, removed, or put aside."""

import errno
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from relora_mora.checkpoint.layout import CheckpointError, abandon, discard, list_checkpoints
from relora_mora.checkpoint.reader import CheckpointReader, find_checkpoint, first_whole, newest_manifest, verify
from relora_mora.checkpoint.writer import tidy
from relora_mora.config.load import validate
from relora_mora.config.schema import Config
from relora_mora.train.state.resume import where_to_resume
from tests.checkpoint.tools import STATE, change_state
from tests.tools.config_tools import tree
from tests.tools.each import each
from tests.tools.runs import checkpoint_at


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


def test_a_checkpoint_folder_may_be_a_link(folder):
    (folder / "another disk").mkdir()
    (folder / "step-00000015").rename(folder / "another disk" / "step-00000015")
    (folder / "step-00000015").symlink_to(folder / "another disk" / "step-00000015")
    assert first_whole(list_checkpoints(folder)) == (folder / "step-00000015", [])


@each("key", ["master|a|7", "exp_avg|b|0", "exp_avg_sq|b|0"])
def test_numbers_that_are_not_finite_are_not_read(made, tmp_path, key):
    """Although their checksum is right: no resume, export, evaluation or warm start may use them."""
    folder = shutil.copytree(made, tmp_path / "checkpoints")
    kind, name, _ = key.split("|")
    change_state(folder / "step-00000015", lambda tensors: tensors[key].reshape(-1)[-1:].fill_(math.inf))
    reader = CheckpointReader(folder / "step-00000015")
    with pytest.raises(
        CheckpointError, match=f"{kind} of {name} holds numbers that are not finite; use an older checkpoint"
    ):
        reader.piece(kind, name, 0, reader.manifest.numel(name))
    assert reader.piece(kind, name, 0, 1).isfinite().all()  # only the last element is damaged


def test_a_checkpoint_of_other_parameters_is_refused_by_name(made):
    reader = CheckpointReader(made / "step-00000015")
    moments = dict.fromkeys(("a", "new"), ("exp_avg", "exp_avg_sq"))
    shapes = {"a": torch.Size([4, 3]), "new": torch.Size([2])}
    engine: Any = SimpleNamespace(shapes=shapes, moments=moments, matrix_shapes={}, groups={"adapters": [*moments]})
    with pytest.raises(CheckpointError, match=r"differ from this run's \(b, new\); resume with the settings"):
        reader.restore(engine, SimpleNamespace(owner={}))


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
