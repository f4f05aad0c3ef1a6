"""A run whose newest checkpoints are damaged goes on from the newest whole one, and says what it passed over and why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import metrics, run_config, tensors, train, write_inputs

pytestmark = pytest.mark.distributed


def logged(config: Any) -> list[str]:
    """Trains; returns this rank's lines of warnings and errors."""
    from relora_mora.metrics import log

    lines: list[str] = []

    def keep(record: Any) -> bool:
        if record.levelname in ("WARNING", "ERROR"):
            lines.append(record.getMessage())
        return True

    log.addFilter(keep)
    try:
        train(config)
    finally:
        log.removeFilter(keep)
    return lines


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """The file has names in other checkpoints as well: those are to keep what they have."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(change(content))


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def _other_number(content: bytes) -> bytes:
    """Still JSON, with the fields it should have."""
    changed = content.replace(b'"tokens": 2', b'"tokens": 3')
    assert changed != content
    return changed


# step: what is done to it, the file that the line names, what the line says
DAMAGES: dict[int, tuple[Callable[[Path], Any], str, str]] = {
    9: (lambda folder: (folder / "manifest.json").unlink(), "manifest.json", "No such file"),
    8: (lambda folder: _rewrite(folder / "manifest.json", _other_number), "manifest.json", "checksum"),
    7: (lambda folder: _rewrite(folder / "state-00001-of-00002.safetensors", _flip), "state-00001-of-00002.safetensors", "checksum"),
    6: (lambda folder: _rewrite(folder / "base-00000-of-00002.safetensors", lambda content: content[:-1]), "base-00000", "bytes, expected"),
    5: (lambda folder: _rewrite(folder / "tokenizer" / "tokenizer.model", lambda _: b""), "tokenizer/tokenizer.model", "0 bytes, expected"),
}


def test_damaged_checkpoints_are_passed_over_named_and_made_again(pools, tokenizer_path, tmp_path):
    inputs, never, folder = write_inputs(tmp_path), tmp_path / "never", tmp_path / "run"
    pools(2)(train, run_config(inputs, tokenizer_path, never, 2))
    config = run_config(inputs, tokenizer_path, folder, 2)
    pools(2)(train, config, stop_after=9)
    checkpoints = folder / "checkpoints"
    for step, (damage, _, _) in DAMAGES.items():
        damage(checkpoints / f"step-{step:08d}")
    (checkpoints / "latest").write_text("step-00000099\n")
    (checkpoints / "step-00000010.1.tmp").mkdir()  # what a kill in the middle of a save leaves
    first, _ = pools(2)(logged, config)
    passed_over = [line for line in first if line.startswith("passed over")]
    assert len(passed_over) == len(DAMAGES)
    for line, (step, (_, file, says)) in zip(passed_over, DAMAGES.items(), strict=True):
        assert line.startswith(f"passed over step-{step:08d}: ") and file in line and says in line, line
    assert [line["step"] for line in metrics(folder) if "train/loss" in line] == list(range(1, 11))
    assert '"step": 4,' in (folder / "starts.jsonl").read_text().splitlines()[-1]
    kept = [f"abandoned-step-{step:08d}" for step in range(5, 10)]  # for whoever wants to know what happened to them
    assert sorted(path.name for path in checkpoints.iterdir()) == [*kept, "latest", *(f"step-{step:08d}" for step in range(1, 11))]
    for step in range(4, 11):  # what was damaged has been made again
        whole, again = (tensors(run / "checkpoints" / f"step-{step:08d}") for run in (never, folder))
        assert set(whole) == set(again) and all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_run_with_nothing_but_damaged_checkpoints_does_not_start_anew(pools, tokenizer_path, tmp_path):
    inputs, folder = write_inputs(tmp_path), tmp_path / "run"
    config = run_config(inputs, tokenizer_path, folder, 2)
    pools(2)(train, config, stop_after=1)
    shutil.rmtree(folder / "checkpoints" / "step-00000001" / "tokenizer")
    messages = pools(2)(_refused, config)
    assert all("none of 1 checkpoints is whole" in message for message in messages)


def _refused(config: Any) -> str:
    from relora_mora.checkpoint import CheckpointError
    from relora_mora.trainer import pretrain

    with pytest.raises(CheckpointError) as caught:
        pretrain(config)
    return str(caught.value)
