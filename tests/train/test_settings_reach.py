"""Which settings of model and data reach the evaluation; and that relora-mora evaluate sees what training saw."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from relora_mora.config.data import DataConfig
from relora_mora.config.schema import Config, ModelConfig
from tests.tools.commands import EVALUATE, call
from tests.tools.data_tools import some_texts, write_shard
from tests.tools.runs import LLAMA, logged_values, run_config, train

pytestmark = pytest.mark.distributed


class Reach(NamedTuple):
    """``value``: another one than in :func:`_config`. Whether it changes the held-out loss before the first step."""

    value: Any
    evaluation: bool


# every setting is listed here; a new one says what it must reach
REACHES = {
    "model.config": Reach("narrow.json", True),
    "model.overrides": Reach({"rms_norm_eps": 0.5}, True),
    "model.init_from": Reach("export", True),
    "model.adapter": Reach(None, True),  # needs an adapter of the model: tests/adapters
    "model.new_tokens": Reach(None, True),  # needs a longer tokenizer: tests/train/test_new_tokens.py
    "model.attention": Reach("eager", False),
    "model.activation_checkpointing": Reach(True, False),
    "model.compile": Reach(None, False),  # takes a compiler and a minute: tests/kernels/test_kernels.py
    "data.train": Reach("validation.json", False),
    "data.concatenate": Reach(None, False),  # only of records: tests/data/stream/test_concatenation.py
    "data.stages": Reach(None, False),  # of mixtures only: tests/data/stream/test_mixture.py
    "data.validation": Reach("train.json", True),
    "data.revision": Reach("v2", False),
    "data.commits": Reach({"some/set@main": "0" * 40}, False),
    "data.records": Reach(None, True),  # of other rows: tests/train/test_records_run.py
    "data.packing": Reach(None, True),  # as above: here a stream is evaluated again
    "data.text_column": Reach("url", True),
    "data.sample_by": Reach("line", False),  # only of .txt: tests/data/test_lines.py
    "data.sequence_length": Reach(16, True),
    "data.lanes": Reach(2, False),
    "data.workers": Reach(1, False),
    "data.prefetch_batches": Reach(1, False),
    "data.shuffle_documents": Reach(3, False),
    "data.seed": Reach(5, False),
    "data.document_mask": Reach(True, True),
    "data.max_line_bytes": Reach(100, True),
    "data.max_bad_fraction": Reach(0.9, False),
    "data.timeout_seconds": Reach(5.0, False),
}
PATHS = {"model.config", "model.init_from", "data.train", "data.validation"}
CHANGED = [name for name, reach in REACHES.items() if reach.value is not None]
TOLERANCE = 1e-5


def test_every_setting_of_model_and_data_says_what_it_reaches():
    settings = {
        f"{section}.{name}"
        for section, model in (("model", ModelConfig), ("data", DataConfig))
        for name in model.model_fields
    }
    assert settings == set(REACHES)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_shard(folder / "train.json", some_texts(60, seed=1, words=12))
    write_shard(folder / "validation.json", some_texts(30, seed=2, words=12))
    (folder / "model.json").write_text(json.dumps(LLAMA))
    (folder / "narrow.json").write_text(json.dumps(LLAMA | {"intermediate_size": 24}))
    return folder


def _config(inputs: Path, tokenizer: str, run_dir: Path, *changed: str) -> Config:
    """One step, evaluated before and after; with some settings changed."""
    sections: dict[str, dict[str, Any]] = {
        "data": {
            "train": str(inputs / "train.json"),
            "validation": str(inputs / "validation.json"),
            "max_bad_fraction": 1.0,
            "lanes": 4,
            "timeout_seconds": 60.0,
        },
        "method": {"name": "mora"},
        "optim": {"warmup_steps": 0},
        "train": {"steps": 1},
        "eval": {"max_tokens": None},
        "model": {},
    }
    for name in changed:
        section, _, key = name.partition(".")
        value = REACHES[name].value
        sections[section][key] = str(inputs / value) if name in PATHS else value
    return run_config(inputs, tokenizer, run_dir, **sections)


def evaluations(config: Config) -> dict[str, float]:
    """One run, which is exported, and its loss as three ways of evaluating see it."""
    from relora_mora.weights.export import export

    train(config)
    run_dir = Path(config.train.run_dir)
    before, after = logged_values(run_dir, "eval/loss")
    export(run_dir, run_dir / "export")
    answer = call(EVALUATE, run_dir, f"--data={config.data.validation[''][0].source}")
    return {"before": before, "trainer": after, "command": json.loads(answer.out.splitlines()[-1])["loss"]}


@pytest.fixture(scope="module")
def unchanged(pools, inputs, tokenizer_path, tmp_path_factory) -> dict[str, float]:
    run_dir = tmp_path_factory.mktemp("unchanged") / "run"
    (seen,) = pools(1)(evaluations, _config(inputs, tokenizer_path, run_dir))
    (run_dir / "export").rename(inputs / "export")
    return seen


# settings that only training reads, all changed together
ONLY_TRAINED = tuple(name for name in CHANGED if name.startswith("data.") and not REACHES[name].evaluation)
EACH_OTHER = [(name,) for name in CHANGED if name not in ONLY_TRAINED]


@pytest.mark.more
@pytest.mark.parametrize(
    "names", [(), ONLY_TRAINED, *EACH_OTHER], ids=lambda names: names[0] if len(names) == 1 else None
)
def test_what_training_sees_is_evaluated(pools, inputs, tokenizer_path, tmp_path, unchanged, names):
    seen = unchanged
    if names:
        (seen,) = pools(1)(evaluations, _config(inputs, tokenizer_path, tmp_path / "run", *names))
        changed = abs(seen["before"] - unchanged["before"]) > TOLERANCE
        assert changed == any(REACHES[name].evaluation for name in names)
    assert seen["trainer"] != seen["before"]
    assert seen["command"] == pytest.approx(seen["trainer"], abs=TOLERANCE)
