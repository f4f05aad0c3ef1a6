"""Fine-tuning: a folder, an export, a run or a checkpoint trains on unchanged, and anybody can load the result."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from relora_mora.config.schema import Config
from relora_mora.system.run_folder import RunFolder
from relora_mora.weights.export import export
from tests.tools.adapter_tools import ADAPTERS_ONLY
from tests.tools.commands import FINETUNE, call, refused
from tests.tools.each import each
from tests.tools.runs import LLAMA, checkpoint_at, logged_values, run_config, train
from tests.tools.tokenizer_tools import save_bytes_tokenizer

pytestmark = pytest.mark.distributed


def save(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A model with its tokenizer in one folder."""
    torch.manual_seed(5)
    architecture = CONFIG_MAPPING[kind]
    model = AutoModelForCausalLM.from_config(architecture(**(LLAMA | {"initializer_range": 0.1} | changes)))
    model.save_pretrained(folder)
    save_bytes_tokenizer(folder)
    return folder


def tuned(inputs: Path, folder: Path, run_dir: Path, world_size: int = 1, **sections: dict[str, Any]) -> Config:
    """A run of ten steps that takes config and tokenizer from the folder, with merges after 4 and 8."""
    method = {**ADAPTERS_ONLY, "dropout": 0.1, **sections.pop("method", {})}
    model = {"config": None, "init_from": str(folder)}
    return run_config(inputs, None, run_dir, world_size, model=model, method=method, **sections)


def test_a_run_its_checkpoint_and_its_export_give_the_same_first_loss(pools, inputs, tmp_path):
    """Each with its own config and tokenizer, and none needs the folder that the run began from."""
    folder = save(tmp_path / "model", "qwen2", num_key_value_heads=2)
    run = tmp_path / "run"
    pools(1)(train, tuned(inputs, folder, run, train={"steps": 5}))
    export(run, tmp_path / "out")
    shutil.rmtree(folder)
    last = logged_values(run, "eval/loss")[-1]
    for number, start in enumerate([run, checkpoint_at(run, 5), tmp_path / "out"]):
        again = tmp_path / f"again{number}"
        pools(1)(train, tuned(inputs, start, again), stop_after=0)
        assert logged_values(again, "eval/loss")[0] == pytest.approx(last, abs=1e-5)
        assert yaml.safe_load(RunFolder(again).config.read_text())["tokenizer"]["path"] is not None


@pytest.fixture
def settings(inputs, tmp_path) -> Path:
    """The least that a file for fine-tuning says."""
    folder = save(tmp_path / "model", "qwen3", num_key_value_heads=1)
    tree = {
        "model": {"init_from": str(folder)},
        "data": {
            "train": f"{inputs}/train/*.json.gz",
            "validation": f"{inputs}/validation/*.json.gz",
            "sequence_length": 32,
            "workers": 0,
        },
        "train": {"run_dir": str(tmp_path / "run"), "micro_batch_size": 8, "precision": "fp32"},
        "log": {"progress": False, "tensorboard": False, "peak_tflops": 1.0},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.more
def test_a_file_that_names_model_text_and_folder_is_enough(pools, settings, tmp_path):
    (answer,) = pools(1)(call, FINETUNE, settings, "--train.batch_size=8", "--data.lanes=2")
    assert answer.code == 0, answer.err
    saved = yaml.safe_load(RunFolder(tmp_path / "run").config.read_text())
    assert saved["method"]["name"] == "mora"
    assert saved["method"]["operators"][0] == 6
    assert not any(saved["method"][key] for key in ADAPTERS_ONLY)
    steps = saved["train"]["steps"]  # of three epochs
    assert 0 < saved["optim"]["warmup_steps"] == round(0.03 * steps)
    assert saved["optim"]["warmup_fraction"] is None
    losses = logged_values(tmp_path / "run", "eval/loss")
    assert len(losses) == 2
    assert losses[1] < losses[0]


@each(
    ("words", "parts"),
    [
        (["--model.init_from=nowhere"], ["model.init_from: nowhere does not exist"]),
        (["--model.init_from=/", "--show=1"], ["model.init_from: / holds neither a config.json nor checkpoints"]),
        (["--data.validation=nowhere.jsonl", "--show=1"], ["nowhere.jsonl"]),
        (["--method.name=remora", "--method.reset=carry"], ["method.reset: carry", "unlike 6; set method.operators"]),
        (["--tokenizer.path=nowhere", "--show=1"], ["nowhere: not found; expected a folder with tokenizer.model"]),
        (
            ["--model.init_from=null"],
            ["2 faults", "model.config: must be given, unless model.init_from", "tokenizer.path:"],
        ),
    ],
)
def test_settings_that_cannot_work(pools, settings, words, parts):
    (answer,) = pools(1)(call, FINETUNE, settings, *words)
    refused(answer, *parts)


@pytest.mark.more
def test_a_tokenizer_that_does_not_fit_the_model(pools, settings, tokenizer_path, tmp_path):
    small = save(tmp_path / "small", "qwen3", num_key_value_heads=1, vocab_size=200)
    (answer,) = pools(1)(call, FINETUNE, settings, f"--model.init_from={small}", "--show=1")
    refused(answer, "257 token ids, but the model has only 200", "use the tokenizer that the model was trained with")
    qwen2 = save(tmp_path / "qwen2", "qwen2", num_key_value_heads=1)
    (answer,) = pools(1)(call, FINETUNE, settings, f"--model.init_from={qwen2}", f"--tokenizer.path={tokenizer_path}")
    message = "transformers gives other ids for it once it is saved; next to a model, give a tokenizer for that type"
    refused(answer, f"{tokenizer_path}: {message}", notes=1)


def test_damaged_weights_are_reported_before_any_text_is_read(pools, settings, tmp_path):
    folder = save(tmp_path / "start", num_key_value_heads=1)
    (folder / "model.safetensors").write_bytes(b"no weights")
    (answer,) = pools(1)(call, FINETUNE, settings, f"--model.init_from={folder}")
    refused(answer, "model.safetensors: cannot be read as safetensors", "fetch it again")
    assert "counting" not in answer.err
    assert not (tmp_path / "run").exists()
