"""The files of a checkpoint: what is whole, what is damaged, what a stranger's file can do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relora_mora.checkpoint import (
    CheckpointError,
    CheckpointReader,
    Manifest,
    changed_settings,
    list_checkpoints,
    newest_whole,
    read_manifest,
    verify,
)
from relora_mora.checkpoint.layout import file_entry, write_synced


def _manifest(folder: Path, step: int) -> Manifest:
    folder.mkdir(parents=True)
    (folder / "state-00000-of-00001.safetensors").write_bytes(b"x" * 100)
    manifest = Manifest(
        step=step,
        merges_done=0,
        operator=1,
        world_size=1,
        zero_stage=2,
        bf16=False,
        group_steps={"adapters": step},
        parameters={},
        frozen={},
        config={},
        model_config={},
        tokenizer_fingerprint="t",
        data_fingerprint="d",
        data_state={"0": {"row": 3}},
        counters={"tokens": 1},
        files={"state-00000-of-00001.safetensors": file_entry(folder / "state-00000-of-00001.safetensors")},
    )
    write_synced(folder / "manifest.json", manifest.dump())
    return manifest


def test_a_manifest_comes_back_as_it_was(tmp_path):
    manifest = _manifest(tmp_path / "step-00000001", 1)
    assert read_manifest(tmp_path / "step-00000001") == manifest
    assert verify(tmp_path / "step-00000001") is None


def _missing(folder: Path) -> None:
    (folder / "state-00000-of-00001.safetensors").unlink()


def _cut(folder: Path) -> None:
    (folder / "state-00000-of-00001.safetensors").write_bytes(b"x" * 99)


def _flipped(folder: Path) -> None:
    (folder / "state-00000-of-00001.safetensors").write_bytes(b"x" * 99 + b"y")


def _empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("")


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _other_version(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text()) | {"version": 99}
    (folder / "manifest.json").write_text(json.dumps(values))


def _other_fields(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    del values["step"]
    (folder / "manifest.json").write_text(json.dumps(values))


DAMAGES = [
    (_missing, "No such file"),
    (_cut, "99 bytes, expected 100"),
    (_flipped, "checksum"),
    (_empty_manifest, "not JSON"),
    (_no_manifest, "no checkpoint"),
    (_other_version, "format version 99, this program reads version 1"),
    (_other_fields, "fields are not those"),
]


@pytest.mark.parametrize("damage,says", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path, damage, says):
    for step in (5, 10, 15):
        _manifest(tmp_path / f"step-{step:08d}", step)
    damage(tmp_path / "step-00000015")
    found, skipped = newest_whole(tmp_path)
    assert found == tmp_path / "step-00000010"
    assert len(skipped) == 1 and skipped[0].startswith("step-00000015:") and says in skipped[0]


def test_what_is_not_named_like_a_checkpoint_is_none(tmp_path):
    for name in ("step-00000005", "step-00000010.tmp", "best", "step-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005"]
    assert list_checkpoints(tmp_path / "none") == []


def test_a_pickle_in_place_of_tensors_is_refused(tmp_path):
    import torch

    folder = tmp_path / "step-00000001"
    manifest = _manifest(folder, 1)
    torch.save({"a": 1}, folder / "state-00000-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointReader(folder)
    assert verify(folder) is not None and manifest.files


def test_changed_settings_are_named():
    saved = {"optim": {"lr": 1.0, "clip": 1.0}, "train": {"steps": 3}}
    now = {"optim": {"lr": 2.0, "clip": 1.0, "new": 1}, "train": {"steps": 3}}
    assert sorted(changed_settings(saved, now)) == ["optim.lr", "optim.new"]
