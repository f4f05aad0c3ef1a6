"""Bad numbers on one rank: no rank steps, the run goes back and skips the data, and a kill changes nothing."""

import json

import pytest
import torch

from tests.tools.grids import rest
from tests.tools.runs import checkpoint_at, logged_steps, metrics, tensors
from tests.train.state.faults import NAN, fault_settings, faulty, rollbacks, same_run

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("stage", "precision", "what"),
    [
        (0, "fp32", "factors"),  # a loss and its gradient
        (1, "bf16", "added"),  # only a loss
        *rest((0, "bf16", "factors"), (1, "bf16", "factors"), (2, "bf16", "factors"), (3, "fp32", "factors")),
    ],
)
def test_one_rank_with_nan_skips_the_step_on_all_and_is_named(runs, pools, tmp_path, stage, precision, what):
    folder = tmp_path / "run"
    config = runs.config(folder, 2, train={"zero_stage": stage, "precision": precision, "max_bad_steps": 3})
    assert pools(2)(faulty, config, **{"factors": {}, what: {4: float("nan")}}) == ["", ""]
    before, after = (tensors(checkpoint_at(folder, step)) for step in (3, 4))
    masters = [key for key in before if key.startswith("master|")]
    merged = {key for key in masters if "mora_M" in key}  # the merge after step 4 is made all the same
    assert masters
    assert all(torch.equal(before[key], after[key]) for key in masters if key not in merged)
    (line,) = [line for line in metrics(folder) if "train/skipped_steps" in line]
    assert line["step"] == 4
    assert line["train/skipped_steps"] == 1
    (place,) = line["train/skipped_data"]
    assert place.startswith("rank 1: lane 1: epoch 0, after ")
    assert ".json.gz" in place
    assert logged_steps(folder) == [1, 2, 3, 5, 6, 7, 8, 9, 10]


@pytest.mark.more
def test_bad_steps_in_a_row_roll_back_and_skip_their_data(pools, inputs, tokenizer_path, tmp_path):
    rolled, killed, reference = tmp_path / "rolled", tmp_path / "killed", tmp_path / "reference"
    pools(2)(faulty, fault_settings(reference, inputs, tokenizer_path), {}, drop=(4, 5))
    pools(2)(faulty, fault_settings(rolled, inputs, tokenizer_path), NAN)
    assert same_run(rolled, reference)
    (line,) = [line for line in metrics(rolled) if "train/rollbacks" in line]
    assert (line["step"], line["train/rolled_back_from"]) == (3, 5)
    assert [place[:14] for place in line["train/skipped_data"]] == ["rank 1: lane 1"] * 2
    assert logged_steps(rolled) == list(range(1, 11))
    # after a kill before the next checkpoint, the same numbers lead to the same rollback
    pools(2)(faulty, fault_settings(killed, inputs, tokenizer_path), NAN, stop_at=(1, 5))
    assert not checkpoint_at(killed, 6).exists()
    pools(2)(faulty, fault_settings(killed, inputs, tokenizer_path), NAN)
    assert same_run(killed, reference)
    assert rollbacks(killed) == [(3, 5)]


@pytest.mark.more
def test_one_rollback_too_many_ends_the_run_with_a_report(pools, inputs, tokenizer_path, tmp_path):
    bad = {number: float("inf") for number in (4, 5, 9, 10)}
    messages = pools(2)(faulty, fault_settings(tmp_path / "run", inputs, tokenizer_path), bad)
    assert messages[0] == messages[1]
    assert "2 steps in a row" in messages[0]
    assert "train.max_rollbacks=1 allows no further rollback" in messages[0]
    assert "lower optim.lr" in messages[0]
    end = json.loads((tmp_path / "run" / "ends.jsonl").read_text().splitlines()[-1])
    assert end["code"] == 1
    assert end["reason"] == messages[0]
    more = fault_settings(tmp_path / "more", inputs, tokenizer_path, max_rollbacks=2)
    assert pools(2)(faulty, more, bad) == ["", ""]
    assert rollbacks(tmp_path / "more") == [(3, 5), (6, 8)]


@pytest.mark.more
def test_without_a_checkpoint_for_a_rollback_the_run_ends(pools, inputs, tokenizer_path, tmp_path):
    config = fault_settings(tmp_path / "run", inputs, tokenizer_path)
    messages = pools(2)(faulty, config, {2: float("nan"), 3: float("nan")})
    assert all("there is no earlier checkpoint" in message for message in messages)
