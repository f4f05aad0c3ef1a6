"""If its newest checkpoints are damaged, a run continues from the newest complete one and says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relora_mora.system.logs import shared_log
from tests.tools.runs import (
    checkpoint_at,
    copy_cut_at,
    different_tensors,
    log_lines,
    logged_steps,
    refusal_of,
    run_config,
    train,
    write_inputs,
)

pytestmark = pytest.mark.distributed


def logged(config: Any) -> list[str]:
    """Trains; returns this rank's warnings and errors."""
    with log_lines("WARNING", "ERROR", logger=shared_log) as lines:
        train(config)
    return lines


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replaces a file and leaves its hard links in other checkpoints as they are."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(change(content))


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def _other_number(content: bytes) -> bytes:
    """JSON with the same fields and another number."""
    changed = content.replace(b'"tokens": 2', b'"tokens": 3')
    assert changed != content
    return changed


# step: the file that is damaged, and what is done to it
DAMAGES: dict[int, tuple[str, Callable[[Path], Any]]] = {
    9: ("manifest.json", Path.unlink),
    8: ("manifest.json", lambda path: _rewrite(path, _other_number)),
    7: ("state-00001-of-00002.safetensors", lambda path: _rewrite(path, _flip)),
    6: ("base-00000-of-00002.safetensors", lambda path: _rewrite(path, lambda content: content[:-1])),
    5: ("state-00000-of-00002.safetensors", Path.unlink),
}


def test_damaged_checkpoints_are_skipped_named_and_written_again(pools, tokenizer_path, tmp_path):
    inputs = write_inputs(tmp_path)
    never = tmp_path / "never"
    folder = tmp_path / "run"
    pools(2)(train, run_config(inputs, tokenizer_path, never, 2))
    copy_cut_at(never, folder, 9)
    config = run_config(inputs, tokenizer_path, folder, 2)
    checkpoints = folder / "checkpoints"
    for step, (file, damage) in DAMAGES.items():
        damage(checkpoints / f"step-{step:08d}" / file)
    (checkpoints / "latest").write_text("step-00000099\n")
    (checkpoints / "step-00000010.1.tmp").mkdir()  # as after a kill in the middle of a save
    first, _ = pools(2)(logged, config)
    passed_over = [line for line in first if line.startswith("passed over")]
    assert len(passed_over) == len(DAMAGES)
    for line, (step, (file, _)) in zip(passed_over, DAMAGES.items(), strict=True):
        assert f"checkpoints/step-{step:08d}" in line and file in line, line
    assert logged_steps(folder) == list(range(1, 11))
    assert '"step": 4,' in (folder / "starts.jsonl").read_text().splitlines()[-1]
    kept = [f"abandoned-step-{step:08d}" for step in range(5, 10)]  # kept so that a user can look into the damage
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        *kept,
        "latest",
        *(f"step-{step:08d}" for step in range(1, 11)),
    ]
    for step in range(4, 11):  # the damaged checkpoints were written again
        assert different_tensors(*(checkpoint_at(run, step) for run in (never, folder))) == []


@pytest.mark.more
def test_a_run_with_only_damaged_checkpoints_does_not_start_over(pools, tokenizer_path, tmp_path):
    inputs = write_inputs(tmp_path)
    folder = tmp_path / "run"
    config = run_config(inputs, tokenizer_path, folder, 2)
    pools(2)(train, config, stop_after=1)
    (checkpoint_at(folder, 1) / "state-00001-of-00002.safetensors").unlink()
    messages = pools(2)(refusal_of, config)
    assert all("all checkpoints in it are damaged" in message for message in messages)
