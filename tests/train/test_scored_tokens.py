"""Every scored token of a step weighs the same, however they fall on micro-batches and ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.grids import rest
from tests.tools.runs import checkpoint_at, logged_values, run_config, tensors, train

pytestmark = pytest.mark.distributed
STEPS = 6


def mostly_unscored(config: Any) -> None:
    """Trains on sequences in which only some tokens are scored, from one to all; their content says how many."""
    from relora_mora.data.stream.packing import UNSCORED
    from relora_mora.data.stream.stream import TrainStream

    whole = TrainStream.__next__

    def masked(self: TrainStream) -> Any:
        batch = whole(self)
        labels = batch.labels.clone()
        for row, ids in zip(labels, batch.input_ids, strict=True):
            row[1 + int(ids.sum()) % len(row) :] = UNSCORED
        return replace(batch, labels=labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStream, "__next__", masked)
        train(config)


def run(pools: Any, inputs: Path, tokenizer: str, folder: Path, world_size: int, **settings: Any) -> Path:
    config = run_config(inputs, tokenizer, folder, world_size, train={"steps": STEPS, **settings})
    pools(world_size)(mostly_unscored, config)
    return folder


@pytest.fixture(scope="module")
def at_once(pools, inputs, tokenizer_path, tmp_path_factory) -> Path:
    """One rank, one micro-batch: a mean over all scored tokens, as any framework takes it."""
    folder = tmp_path_factory.mktemp("at_once") / "run"
    return run(pools, inputs, tokenizer_path, folder, 1, micro_batch_size=8, zero_stage=0)


@pytest.mark.parametrize("stage", [0, *rest((1,), (2,), (3,))])
def test_a_step_is_the_mean_over_its_scored_tokens(pools, inputs, tokenizer_path, tmp_path, at_once, stage):
    folder = run(pools, inputs, tokenizer_path, tmp_path / "run", 2, micro_batch_size=1, zero_stage=stage)
    losses = [logged_values(of) for of in (at_once, folder)]
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    expected = _masters(at_once)
    for name, value in _masters(folder).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=name)


def _masters(run_dir: Path) -> dict[str, torch.Tensor]:
    """Whole float32 masters by parameter, flat."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for key, value in tensors(checkpoint_at(run_dir, STEPS)).items():
        kind, name, start = key.split("|")
        if kind == "master":
            pieces.setdefault(name, []).append((int(start), value.flatten()))
    return {name: torch.cat([value for _, value in sorted(found)]) for name, found in pieces.items()}
