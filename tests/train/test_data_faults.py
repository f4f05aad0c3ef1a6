"""A run whose data comes from a bad network, with bad lines in it, trains as with good data."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from relora_mora.config.schema import Config
from relora_mora.data.bytes import retry
from relora_mora.data.bytes.retry import RETRIES
from tests.tools.data_tools import some_texts, write_shard
from tests.tools.faulty_server import FAULTS, serving
from tests.tools.runs import checkpoint_at, metrics, run_config, tensors, train, write_inputs

pytestmark = pytest.mark.distributed

SHARDS = 40
BAD = [b"rubbish", b'{"text": 3}', b""]
STEPS = 6


def _train(config: Config) -> None:
    RETRIES.retries = 0  # of runs that this process has made before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "FIRST_WAIT_SECONDS", 0.01)
        train(config)


@pytest.mark.more
def test_a_run_on_a_faulty_network_ends_with_the_same_weights(pools, tokenizer_path, tmp_path):
    inputs = write_inputs(tmp_path / "inputs")
    for n in range(SHARDS):
        write_shard(inputs / "train" / f"{n}.json.gz", [*some_texts(3, seed=n), *BAD])
    with serving(inputs) as server:
        server.stall_seconds, server.retry_after["429"] = 0.5, "0"
        rng, kinds = random.Random(1), itertools.cycle(FAULTS)
        for name in ("clean", "faulty"):
            if name == "faulty":
                server.requests.clear()
                server.fault = lambda n: next(kinds) if rng.random() < 0.1 else None
            data = {
                "train": f"{server.url}/train/{{0..{SHARDS - 1}}}.json.gz",
                "validation": f"{server.url}/validation/part-00000.json.gz",
                "max_bad_fraction": 0.5,
            }
            sections = {"data": data, "train": {"steps": STEPS}, "checkpoint": {"every_steps": STEPS}}
            config = run_config(inputs, tokenizer_path, tmp_path / name, 2, **sections)
            pools(2)(_train, config)
        assert 0.05 < len(server.faults) / len(server.requests) < 0.2
        assert len(server.faults) >= 10
    first, second = (tensors(checkpoint_at(tmp_path / name, STEPS)) for name in ("clean", "faulty"))
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    clean, faulty = (
        [line for line in metrics(tmp_path / name) if "train/loss" in line] for name in ("clean", "faulty")
    )
    assert [line["train/loss"] for line in clean] == [line["train/loss"] for line in faulty]
    assert len(clean) == STEPS
    assert clean[-1]["perf/data_retries"] == 0 < faulty[-1]["perf/data_retries"] <= len(server.faults)
    counted = [key for key in clean[-1] if key.startswith(("perf/data_bad", "perf/data_skipped", "train/documents"))]
    assert {key: clean[-1][key] for key in counted} == {key: faulty[-1][key] for key in counted}
    bad = clean[-1]["perf/data_skipped/not_json"] + clean[-1]["perf/data_skipped/text_not_string"]
    assert clean[-1]["perf/data_bad_lines"] == bad > 0 < clean[-1]["perf/data_skipped/blank_line"]
