"""A run whose length is given in epochs of its text."""

import math

import pytest

from relora_mora.config.load import ConfigError
from relora_mora.data.errors import SourceError
from relora_mora.data.read import count_epochs
from tests.tools.runs import metrics, refusal_of, run_config, train, write_inputs

pytestmark = pytest.mark.distributed


@pytest.mark.more
def test_epochs_are_counted_and_the_run_ends_when_they_are_read(pools, tokenizer_path, tmp_path):
    inputs = write_inputs(tmp_path / "inputs")
    settings = {
        "train": {"steps": None, "epochs": 2.0, "batch_size": 24},
        "data": {"lanes": 3},
        "method": {"merge_every": 4},
    }
    config = run_config(inputs, tokenizer_path, tmp_path / "run", 1, **settings)
    tokens = count_epochs(config.data, tokenizer_path, lanes=config.lanes, epochs=2)
    steps = math.ceil(tokens / (24 * 32))
    pools(1)(train, config)
    (last,) = [line for line in metrics(tmp_path / "run") if line["step"] == steps and "train/epoch" in line]
    assert last["train/epoch"] in (1, 2)
    assert not [line for line in metrics(tmp_path / "run") if line["step"] > steps]
    # 180 documents in three lanes, whose shards are not of the very same length
    assert abs(last["train/documents"] - 2 * 180) < 8


def test_nothing_is_counted_if_something_is_missing(pools, tokenizer_path, tmp_path):
    inputs = write_inputs(tmp_path / "inputs")
    (inputs / "train" / "bad.json").write_text("counting would stop here\n")
    data = {"train": f"{inputs}/train/*", "validation": f"{inputs}/nowhere.json"}
    config = run_config(inputs, tokenizer_path, tmp_path / "run", 1, data=data, train={"steps": None, "epochs": 1.0})
    (message,) = pools(1)(refusal_of, config, ConfigError)
    assert "no file matches" in message
    (inputs / "empty.json").touch()
    empty = run_config(inputs, tokenizer_path, tmp_path / "run", 1, data={"train": f"{inputs}/empty.json"})
    with pytest.raises(SourceError, match=r"the training data .*empty\.json holds no text"):
        count_epochs(empty.data, tokenizer_path, lanes=empty.lanes)
