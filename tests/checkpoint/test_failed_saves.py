"""A checkpoint that cannot be written is reported once and leaves no files; training and other saves continue."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_mora.checkpoint.layout import CheckpointError, list_checkpoints
from relora_mora.checkpoint.reader import verify
from tests.tools.checkpoints import made_manifest
from tests.tools.grids import rest
from tests.tools.runs import checkpoint_at, different_tensors, log_lines, run_config, tensors, train

pytestmark = pytest.mark.distributed


def followed(config: Any, failing: dict[int, list[int]] | None = None) -> dict[str, Any]:
    """Trains and returns the errors in this rank's log, and how the run ended.

    In the saves of the steps ``failing[rank]``, that rank's disk is full in the middle of a file.
    """
    from relora_mora.checkpoint import writer as module
    from relora_mora.train.state.run_state import TrainingError

    steps = (failing or {}).get(int(os.environ["RANK"]), [])
    whole = module.save_file

    def save_file(tensors: Any, path: Path) -> None:
        if any(path.parent.name.startswith(f"step-{step:08d}.") for step in steps):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        whole(tensors, path)

    error = ""
    with log_lines("ERROR") as lines, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save_file", save_file)
        try:
            train(config)
        except TrainingError as failure:
            error = str(failure)
    return {"lines": lines, "error": error}


def _steps(folder: Path) -> list[int]:
    """Steps with a checkpoint. Checks that all are complete and that there is nothing else."""
    found = list_checkpoints(folder / "checkpoints")
    for path in found:
        verify(path)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"latest", *(path.name for path in found)}
    assert (folder / "checkpoints" / "latest").read_text() == found[0].name + "\n"
    return sorted(int(path.name[5:]) for path in found)


@pytest.mark.parametrize("rank", [1, *rest((0,))])
def test_a_rank_without_space_costs_one_checkpoint(pools, inputs, tokenizer_path, tmp_path, rank):
    runs = [tmp_path / "never", tmp_path / "failed"]
    for folder, steps in zip(runs, ([], [4, 8]), strict=True):  # the first saves of a merged base
        first, second = pools(2)(followed, run_config(inputs, tokenizer_path, folder, 2), failing={rank: steps})
    assert first["error"] == second["error"] == ""
    assert second["lines"] == []
    for step, line in zip((4, 8), first["lines"], strict=True):
        assert (
            f"step {step} failed (rank {rank}: No space left on device" in line
            and "earlier checkpoints are as they were" in line
        ), line
    assert _steps(runs[1]) == [1, 2, 3, 5, 6, 7, 9, 10]
    for step in (5, 10):
        assert different_tensors(*(checkpoint_at(folder, step) for folder in runs)) == []


@pytest.mark.more
def test_a_run_ends_with_an_error_when_its_last_checkpoint_failed(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    config = run_config(inputs, tokenizer_path, folder, 2)
    both = pools(2)(followed, config, failing={0: [10], 1: [10]})
    for result in both:
        assert "the checkpoint of step 10 failed" in result["error"]
        assert "No space left on device" in result["error"]
        assert result["error"].endswith("(df, df -i); then the same command continues from the newest checkpoint")
    assert len(both[0]["lines"]) == 1
    assert "rank 0: No space" in both[0]["lines"][0]
    assert "rank 1: No space" in both[0]["lines"][0]
    assert _steps(folder) == list(range(1, 10))
    assert [result["error"] for result in pools(2)(followed, config)] == ["", ""]
    assert _steps(folder) == list(range(1, 11))


def saves_of_a_rig(folder: Path, what: str) -> list[str]:
    """Three saves of the same state by a writer without a trainer. The second one may go wrong."""
    from relora_mora.checkpoint import writer as module
    from relora_mora.checkpoint.writer import CheckpointWriter
    from tests.tools.tiny import build_rig, tiny_config

    rig = build_rig(tiny_config(2))
    rank = rig.engine.rank
    whole = CheckpointWriter._write
    writer = CheckpointWriter(
        folder,
        rig.engine,
        rig.base,
        tokenizer=folder.with_name("tokenizer"),
        keep_last=5,
        keep_every_steps=0,
        sync_beside=lambda: None,
    )

    def write(self: Any, work: Path, *args: Any) -> Any:
        """As on a host that does not share the folder with the first rank."""
        elsewhere = what == "elsewhere" and rank == 1 and step == 2
        return whole(self, folder.with_name("of-another-host") / work.name if elsewhere else work, *args)

    with log_lines("ERROR") as lines, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "APPEAR_SECONDS", 0.5)
        patch.setattr(CheckpointWriter, "_write", write)
        for step in (1, 2, 3):
            if step == 2 and what == "damaged" and rank == 0:
                base = folder / "step-00000001" / "base-00000-of-00002.safetensors"
                base.write_bytes(base.read_bytes()[:-1] + b"\xff")
            shapes = {name: list(shape) for name, shape in rig.engine.shapes.items()}
            frozen = {name: shapes.pop(name) for name in rig.base.owner}
            writer.save(made_manifest(step=step, operator=1, world_size=2, frozen=frozen, parameters=shapes), {})
            writer.wait()
            rig.engine.all_reduce(torch.zeros(1))
    return lines


def test_a_rank_that_writes_elsewhere_costs_one_checkpoint(pools, tmp_path):
    [line], second = pools(2)(saves_of_a_rig, tmp_path / "checkpoints", "elsewhere")
    assert "step 2 failed (rank 0 does not see state-00001-of-00002.safetensors, which rank 1 has written" in line
    assert second == []
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step-00000001", "step-00000003"]
    verify(checkpoint_at(tmp_path, 3))


def test_a_base_file_is_shared_unless_it_was_damaged_on_the_disk(pools, tmp_path):
    assert pools(2)(saves_of_a_rig, tmp_path / "checkpoints", "damaged") == [[], []]
    first, second, third = list_checkpoints(tmp_path / "checkpoints")[::-1]
    with pytest.raises(CheckpointError, match=r"base-00000-of-00002\.safetensors: damaged, its size or checksum"):
        verify(first)
    verify(second)
    verify(third)
    links = [
        (path / f"base-0000{rank}-of-00002.safetensors").stat().st_nlink
        for path in (first, second, third)
        for rank in (0, 1)
    ]
    assert links == [1, 3, 2, 3, 2, 3]
    found = [tensors(path) for path in (first, second)]
    damaged = [key for key in found[0] if not torch.equal(found[0][key], found[1][key])]
    assert len(damaged) == 1
    assert damaged[0].startswith("base|")


def slow_to_write(config: Any, what: str) -> bool:
    """Trains with a slow write of step 3; returns whether training continued in the meantime.

    ``save``: the write waits for the fifth step. ``base``: it waits before it reads the base, and the merge after
    step 4 must not come first.
    """
    from relora_mora.checkpoint import writer as module
    from relora_mora.train.loop.loop import Trainer
    from relora_mora.train.pretrain import pretrain

    save_file = module.save_file
    write_base = module.write_base
    train_step = Trainer.train_step
    fifth = threading.Event()
    met: list[bool] = []

    def slow_save(tensors: Any, path: Path) -> None:
        if what == "save" and "step-00000003" in path.parent.name and path.name.startswith("state"):
            met.append(fifth.wait(600))
        save_file(tensors, path)

    def slow_base(path: Path, *args: Any) -> Any:
        if what == "base" and "step-00000003" in path.parent.name:
            met.append(not fifth.wait(1.0))
        return write_base(path, *args)

    def step(self: Trainer, share: Any) -> Any:
        result = train_step(self, share)
        if self.state.step == 5:
            fifth.set()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save_file", slow_save)
        patch.setattr(module, "write_base", slow_base)
        patch.setattr(Trainer, "train_step", step)
        pretrain(config)
    return met == [True]


@pytest.mark.parametrize("what", ["save", *rest(("base",))])
def test_training_continues_during_a_write_but_no_merge_overtakes_it(pools, inputs, tokenizer_path, tmp_path, what):
    quick = tmp_path / "quick"
    slow = tmp_path / "slow"
    settings: dict[str, Any] = {"checkpoint": {"every_steps": 3}, "method": {"merge_every": 5 if what == "save" else 4}}
    pools(2)(followed, run_config(inputs, tokenizer_path, quick, 2, **settings))
    assert pools(2)(slow_to_write, run_config(inputs, tokenizer_path, slow, 2, **settings), what) == [True, True]
    for step in (3, 6, 9, 10):
        assert different_tensors(*(checkpoint_at(folder, step) for folder in (quick, slow))) == []
