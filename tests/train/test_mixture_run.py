"""Runs on a mixture: exact after stops, moves and rollbacks, and counted by source."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relora_mora.data.errors import SourceError
from tests.tools.data_tools import some_texts, write_shard, write_shards
from tests.tools.runs import (
    Stopped,
    checkpoint_at,
    copy_cut_at,
    different_tensors,
    logged_steps,
    metrics,
    run_config,
    train,
    write_inputs,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_shards(folder / "rows", 2, 60, suffix=".parquet", words=20)
    return folder


def _config(inputs: Path, tokenizer: str, run_dir: Path, weight: float = 1.0, **train: Any) -> Any:
    sources = [
        {"source": f"{inputs}/train/*", "name": "lines", "weight": 3.0},
        {"source": f"{inputs}/rows/*", "name": "rows", "weight": weight},
    ]
    stages = [{"from_step": 6, "weights": {"lines": 0.0, "rows": 1.0}}]
    given = {"max_bad_steps": 2, **train}
    return run_config(inputs, tokenizer, run_dir, 2, data={"train": sources, "stages": stages}, train=given)


def _bad_at(config: Any, steps: tuple[int, ...], kill_at: int | None = None) -> None:
    """Trains on every rank; before a rollback some steps are found bad. ``kill_at``: a step after it."""
    from relora_mora.train.loop.loop import Trainer
    from relora_mora.train.pretrain import pretrain

    train_step = Trainer.train_step

    def bad(self: Trainer, share: Any) -> Any:
        if self.state.rollbacks and self.state.step == kill_at:
            raise Stopped
        result = train_step(self, share)
        found_bad = self.state.rollbacks == 0 and self.state.step in steps
        return replace(result, applied=False, data=["the test"]) if found_bad else result

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
        patch.setattr(Trainer, "train_step", bad)
        pretrain(config)


@pytest.fixture(scope="module")
def never(pools, inputs, tokenizer_path, tmp_path_factory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "never"
    pools(2)(train, _config(inputs, tokenizer_path, folder))
    return folder


def _end(run_dir: Path) -> Path:
    return checkpoint_at(run_dir, 10)


def test_a_resume_continues_with_the_same_blocks_and_every_source_is_counted(
    pools, inputs, tokenizer_path, tmp_path, never
):
    copy_cut_at(never, tmp_path / "run", 4)
    pools(2)(train, _config(inputs, tokenizer_path, tmp_path / "run"))
    assert different_tensors(_end(never), _end(tmp_path / "run")) == []
    counted = {line["step"]: line for line in metrics(never) if "train/tokens" in line}
    for step, (lines, rows) in {4: (24, 8), 5: (30, 10), 10: (30, 50)}.items():  # of 8 blocks of 32 tokens a step
        assert counted[step]["train/tokens/lines"] == lines * 32
        assert counted[step]["train/tokens/rows"] == rows * 32
        assert counted[step]["train/tokens"] == (lines + rows) * 32
    assert counted[1]["train/epoch/rows"] == 0


@pytest.mark.more
def test_a_kill_after_a_rollback_does_not_change_the_drawn_sources(pools, inputs, tokenizer_path, tmp_path):
    rolled, killed = tmp_path / "rolled", tmp_path / "killed"
    pools(2)(_bad_at, _config(inputs, tokenizer_path, rolled), (4, 5))
    assert logged_steps(rolled, "train/rollbacks") == [3]
    # a stage covers steps: steps 4 and 5 draw from the first stage, no matter what was drawn before
    counted = {line["step"]: line for line in metrics(rolled) if "train/tokens" in line}
    assert counted[10]["train/tokens/lines"] == (30 + 12) * 32
    assert counted[10]["train/tokens/rows"] == (50 + 4) * 32
    pools(2)(_bad_at, _config(inputs, tokenizer_path, killed), (4, 5), kill_at=3)
    pools(2)(_bad_at, _config(inputs, tokenizer_path, killed), (4, 5))
    assert different_tensors(_end(rolled), _end(killed)) == []
    assert logged_steps(killed, "train/rollbacks") == [3]


@pytest.mark.more
def test_a_source_with_fewer_texts_than_lanes_is_found_long_before_its_stage(runs, inputs, tmp_path):
    """Eight lanes, and a source of seven texts with weight from step 6 on."""
    write_shard(inputs / "few.json", some_texts(7))
    sources = [
        {"source": f"{inputs}/train/*", "name": "lines"},
        {"source": f"{inputs}/few.json", "name": "few", "weight": 0.0},
    ]
    stages = [{"from_step": 6, "weights": {"lines": 1.0, "few": 1.0}}]
    data = {"train": sources, "stages": stages, "lanes": 8}
    message = runs.refusal(runs.config(tmp_path / "run", data=data), SourceError)
    assert "lane 7 found no text in few.json: there are fewer documents than lanes" in message
    assert not (tmp_path / "run" / "checkpoints").exists()
