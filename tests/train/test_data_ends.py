"""Data that fails for good in the middle of a run: all ranks save, say why, and continue when it is back."""

import json
from typing import Any

import pytest

from relora_mora.data.errors import SourceError
from relora_mora.train.loop.step import DataFailed
from relora_mora.train.state.run_state import DataError, TrainingError
from tests.tools.data_tools import write_shard
from tests.tools.grids import rest
from tests.tools.runs import checkpoint_at, metrics

pytestmark = pytest.mark.distributed


def ended(config: Any) -> tuple[str, str]:
    """Runs on every rank: the kind of error that ended a run, and its text. Lanes read few documents ahead."""
    from relora_mora.data.stream import lane
    from relora_mora.train.pretrain import pretrain

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as caught:
        patch.setattr(lane, "ENCODE_ROWS", 2)
        pretrain(config)
    return type(caught.value).__name__, str(caught.value)


def test_all_ranks_end_with_the_error_of_those_whose_data_failed():
    bad, hung, gone = SourceError("a bad row"), RuntimeError("a worker hangs"), OSError("the disk is gone")
    for failures, kind, text in (
        ([bad, bad], DataError, "a bad row"),
        ([bad, hung], TrainingError, "a bad row\na worker hangs"),
        ([bad, gone], OSError, "the disk is gone"),
    ):
        cause = DataFailed(failures).cause
        assert (type(cause), str(cause), cause.same_on_all_ranks) == (kind, text, True)


def test_too_little_text_is_reported_before_the_first_evaluation(runs, pools, tmp_path):
    for number in range(8):  # a file for each lane, which the first batch opens
        write_shard(tmp_path / f"{number}.json.gz", [b'{"text": "the rank"}' if number else b'{"text": ""}'])
    settings = {"data": {"train": str(tmp_path / "*.json.gz")}, "eval": {"at_start": True}}
    [(kind, text)] = pools(1)(ended, runs.config(tmp_path / "run", **settings))
    assert kind == "DataError"
    assert "there are fewer documents than lanes" in text
    assert not any("eval/loss" in line for line in metrics(tmp_path / "run"))


@pytest.mark.more
def test_unreadable_held_out_text_is_reported_before_the_first_step(runs, pools, tmp_path):
    text = tmp_path / "held_out.jsonl"
    text.write_text('{"text": "the rank of a matrix"}\n' * 100 + "{not json\n" * 100)
    settings = {
        "data": {"validation": str(text)},
        "eval": {"max_tokens": None},
    }
    first, second = pools(2)(ended, runs.config(tmp_path / "run", 2, **settings))
    assert first == second
    assert first[0] == "DataError"
    assert "held_out.jsonl" in first[1]
    assert metrics(tmp_path / "run") == []


@pytest.mark.parametrize(
    "fault", ["more than data.max_bad_fraction", *rest(("its compressed data breaks off at byte",))]
)
def test_bad_text_stops_all_ranks_at_the_same_step(runs, pools, tmp_path, fault):
    good = [json.dumps({"text": f"the rank of a merge {n} " * 5}).encode() for n in range(80)]
    write_shard(tmp_path / "data" / "part-0.json.gz", good)
    if "max_bad_fraction" in fault:
        write_shard(tmp_path / "data" / "part-1.json.gz", good[:20] + [b"{not json"] * 60)
    else:
        cut = write_shard(tmp_path / "data" / "part-1.json.gz", good)
        cut.write_bytes(cut.read_bytes()[: 3 * cut.stat().st_size // 4])
    run_dir = tmp_path / "run"
    data = {"train": str(tmp_path / "data" / "*.json.gz"), "shuffle_documents": 4}
    config = runs.config(run_dir, 2, data=data, train={"steps": 400}, checkpoint={"every_steps": 0})
    answers = pools(2)(ended, config)
    assert answers[0] == answers[1]
    assert answers[0][0] == "DataError"
    assert "part-1.json.gz" in answers[0][1]
    assert fault in answers[0][1]
    last = metrics(run_dir)[-1]["step"]
    assert checkpoint_at(run_dir, last).exists()
    again = pools(2)(ended, config)  # the same decision
    assert again[0][1].splitlines()[0] == answers[0][1].splitlines()[0]
