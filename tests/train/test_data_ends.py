"""Data that fails for good in the middle of a run: all ranks save, say why, and continue when it is back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from relora_mora.data.errors import SourceError
from relora_mora.train.loop.loop import fail_for_data
from relora_mora.train.loop.step import DataFailed
from relora_mora.train.state.run_state import DataError, RunState, TrainingError
from tests.tools.data_tools import write_shard, write_shards
from tests.tools.each import each
from tests.tools.faulty_server import serving
from tests.tools.grids import rest
from tests.tools.jobs import ends, last_step
from tests.tools.runs import checkpoint_at, different_tensors, metrics

pytestmark = pytest.mark.distributed
STEPS = 24  # an epoch of the text of the first test, and a few


def ended(config: Any) -> tuple[str, str]:
    """Runs on every rank: the kind of error that ended a run, and its text. Lanes read few documents ahead."""
    from relora_mora.data import lanes
    from relora_mora.train.pretrain import pretrain

    whole = lanes.ENCODE_ROWS
    lanes.ENCODE_ROWS = 2
    try:
        pretrain(config)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        lanes.ENCODE_ROWS = whole
    return "", ""


@pytest.mark.more
def test_a_lasting_server_failure_ends_the_run_with_its_state_saved(runs, pools, tmp_path):
    never, run_dir = tmp_path / "never", tmp_path / "run"
    write_shards(tmp_path / "data", 4, 8)  # an epoch of some twenty steps, so that shards are opened all the time
    with serving(tmp_path / "data") as server:
        source = f"{server.url}/part-{{00000..00003}}.json.gz"
        data = {"train": source, "timeout_seconds": 3.0, "shuffle_documents": 2}
        settings = {"data": data, "checkpoint": {"every_steps": 0}, "train": {"steps": STEPS}}
        patient = settings | {"data": data | {"timeout_seconds": 60.0}}
        assert pools(2)(ended, runs.config(never, 2, **patient)) == [("", "")] * 2
        config = runs.config(run_dir, 2, **settings)
        server.fault = lambda n: "503" if last_step(run_dir) >= 5 else None
        answers = pools(2)(ended, config)
        assert {kind for kind, _ in answers} == {"DataError"}
        assert answers[0] == answers[1]
        text = answers[0][1]
        assert "gave up after 3 s" in text
        assert "check the network" in text
        step = int(text.rpartition("what was trained up to step ")[2].split()[0])
        assert 0 < step < STEPS
        assert checkpoint_at(run_dir, step).exists()
        assert ends(run_dir)[-1]["code"] == 2
        assert ends(run_dir)[-1]["step"] == step
        server.fault = lambda n: None
        assert pools(2)(ended, runs.config(run_dir, 2, **patient)) == [("", "")] * 2
    assert different_tensors(*(checkpoint_at(folder, STEPS) for folder in (never, run_dir))) == []


@each("kind", [OSError, SourceError])
def test_a_data_fault_is_reported_even_if_nothing_can_be_saved(monkeypatch, kind):
    def fail(parts: Any, state: RunState) -> None:
        raise TrainingError("the checkpoint failed")

    monkeypatch.setattr("relora_mora.train.loop.loop.save_final", fail)
    with pytest.raises(OSError if kind is OSError else DataError) as raised:
        fail_for_data(None, RunState(initial_seed=0, step=3), DataFailed([kind("the disk of the text is gone")]))
    assert "the disk of the text is gone" in str(raised.value)
    assert ("the checkpoint failed" in str(raised.value)) == (kind is SourceError)


def test_too_little_text_is_reported_before_the_first_evaluation(runs, pools, tmp_path):
    write_shard(tmp_path / "a.json.gz", [b'{"text": "the rank"}'])
    settings = {"data": {"train": str(tmp_path / "a.json.gz")}, "eval": {"at_start": True}}
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
