"""A run whose operator is drawn again at every merge: resumes, moves, other seeds, exports and compiled layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from relora_mora.data.sets.held_out import load_eval_set
from relora_mora.evaluation.loss import causal_lm_loss, evaluate
from relora_mora.weights.export import merged_model
from tests.tools.grids import rest
from tests.tools.runs import (
    checkpoint_at,
    copy_cut_at,
    logged_steps,
    logged_values,
    manifest_at,
    run_config,
    tensors,
    train,
)
from tests.train.compiled import compiled_graphs, compiler_only

pytestmark = pytest.mark.distributed
DRAWN: dict[str, Any] = {"operators": [7]}


@pytest.fixture(scope="module")
def never(pools: Any, inputs: Path, tokenizer_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "never"
    pools(2)(train, run_config(inputs, tokenizer_path, folder, 2, method=DRAWN))
    return folder


def drawn(config: Any) -> dict[int, list[list[int]]]:
    """Trains; by merges done, the groupings of the inputs and of the outputs of the layers, each once."""
    from relora_mora.adapters.mora import MoRALinear

    seen: dict[int, list[list[int]]] = {}
    set_operator = MoRALinear.set_operator

    def noted(self: Any, mora_type: int, draw: Any = None) -> None:
        set_operator(self, mora_type, draw)
        groupings = seen.setdefault(draw.merges_done, [])
        groupings += [g.numbers for g in (self.operator.inputs, self.operator.outputs) if g.numbers not in groupings]

    with mock.patch.object(MoRALinear, "set_operator", noted):
        train(config)
    return seen


def test_every_merge_draws_other_groupings_and_all_ranks_the_same(pools, inputs, tokenizer_path, tmp_path):
    config = run_config(inputs, tokenizer_path, tmp_path / "run", 2, method=DRAWN)
    first, second = pools(2)(drawn, config)
    assert first == second
    assert set(first) == {0, 1, 2}
    sizes = [[(numbers[0], numbers[1]) for numbers in groupings] for groupings in first.values()]
    assert sizes[0] == sizes[1] == sizes[2]  # the same shapes in the same order
    for a, b in ((0, 1), (1, 2), (0, 2)):
        same = [one == other for one, other in zip(first[a], first[b], strict=True)]
        assert sum(same) < len(same) / 2  # widths of a single run have one grouping only
    assert manifest_at(tmp_path / "run", 5)["operator_seed"] == 0


@pytest.mark.parametrize("stop", [4, *rest((3,), (5,))])
def test_a_resume_is_bit_equal(pools, never, inputs, tokenizer_path, tmp_path, stop):
    folder = copy_cut_at(never, tmp_path / "run", stop)
    pools(2)(train, run_config(inputs, tokenizer_path, folder, 2, method=DRAWN))
    expected = tensors(checkpoint_at(never, 10))
    found = tensors(checkpoint_at(folder, 10))
    assert set(found) == set(expected)
    assert [key for key in found if not found[key].equal(expected[key])] == []
    assert logged_values(folder) == logged_values(never)


def test_a_move_to_other_ranks_and_another_stage_keeps_the_groupings(pools, never, inputs, tokenizer_path, tmp_path):
    folder = copy_cut_at(never, tmp_path / "run", 5)
    config = run_config(inputs, tokenizer_path, folder, 1, method=DRAWN, train={"zero_stage": 0})
    pools(1)(train, config)
    assert logged_values(folder) == pytest.approx(logged_values(never), abs=1e-5)


def test_another_seed_applies_from_the_next_merge_on(pools, never, inputs, tokenizer_path, tmp_path):
    folder = copy_cut_at(never, tmp_path / "run", 5)
    other = {"seed": 3, "allow_changes": ["train.seed"]}
    pools(2)(train, run_config(inputs, tokenizer_path, folder, 2, method=DRAWN, train=other), stop_after=7)
    # M was trained with the groupings of the old seed, even if the run is stopped again
    pools(2)(train, run_config(inputs, tokenizer_path, folder, 2, method=DRAWN, train=other))
    before, after = logged_values(never), logged_values(folder)
    # M is zero after the merge: the step that follows it has the same loss with any grouping
    assert [step for step in range(1, 11) if before[step - 1] != after[step - 1]] == [10]
    seeds = [manifest_at(folder, step)["operator_seed"] for step in (6, 7, 8, 10)]
    assert seeds == [0, 0, 3, 3]


@pytest.mark.parametrize("step", [5, 10])
def test_an_export_has_the_loss_of_the_run(never, inputs, tokenizer_path, tmp_path, step):
    config = run_config(inputs, tokenizer_path, tmp_path / "unused")
    data = load_eval_set(
        config.data.validation, config=config.data, tokenizer_path=tokenizer_path, sequence_length=32, max_tokens=200
    )
    model = merged_model(checkpoint_at(never, step))
    found = evaluate(causal_lm_loss(model), data, micro_batch_size=3, device=torch.device("cpu"))
    logged = dict(zip(logged_steps(never, "eval/loss"), logged_values(never, "eval/loss"), strict=True))
    assert found.loss == pytest.approx(logged[step], abs=2e-5)


def test_without_merges_it_is_drawn_once_and_from_the_seed(pools, inputs, tokenizer_path, tmp_path):
    groupings = []
    for seed in (0, 1):
        method = {"name": "mora", "operators": [7, 1]}
        config = run_config(
            inputs, tokenizer_path, tmp_path / f"run{seed}", 1, method=method, train={"seed": seed, "steps": 3}
        )
        [seen] = pools(1)(drawn, config)
        assert set(seen) == {0}
        groupings.append(seen[0])
    assert groupings[0] != groupings[1]


@pytest.mark.elastic
@compiler_only
def test_all_programs_are_made_before_the_first_step(pools, never, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    config = run_config(inputs, tokenizer_path, folder, 1, method=DRAWN, model={"compile": True})
    [(at_start, at_end)] = pools(1)(compiled_graphs, config)
    assert 0 < at_start == at_end
    assert logged_values(folder) == pytest.approx(logged_values(never), abs=1e-4)
