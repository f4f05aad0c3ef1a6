"""A run that begins with another model's weights begins with its loss, or is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.config.schema import Config, ModelConfig
from relora_mora.model.causal import empty_model
from relora_mora.model.config import read_model_config
from relora_mora.system.logs import log
from relora_mora.weights.export import export
from tests.tools.commands import EVALUATE, call
from tests.tools.each import each
from tests.tools.grids import rest
from tests.tools.runs import LLAMA, logged_values, run_config, train
from tests.tools.tokenizer_tools import save_bytes_tokenizer

pytestmark = pytest.mark.distributed

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama3": {"num_key_value_heads": 1, "head_dim": 16, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500.0}},
    "biased": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "rms_norm_eps": 1e-3, "pad_token_id": 2},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 16, "attention_bias": True},
    "mixtral": {"model_type": "mixtral", "num_key_value_heads": 1, "num_local_experts": 4},
}


def save(
    folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", model_type: str = "llama", **changes: Any
) -> Path:
    """A model with weights that are large, so that every change of what it computes is seen in its loss."""
    torch.manual_seed(7)
    kind = CONFIG_MAPPING[model_type]
    model = AutoModelForCausalLM.from_config(kind(**(LLAMA | {"initializer_range": 0.4} | changes)))
    for value in model.parameters():
        if value.dim() == 1:  # biases and norms
            value.data += torch.randn(value.shape)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def first_loss(pools: Any, inputs: Path, tokenizer: str, run: Path, folder: Path) -> float:
    model = {"config": str(folder / "config.json"), "init_from": str(folder)}
    pools(1)(train, run_config(inputs, tokenizer, run, model=model), stop_after=0)
    return logged_values(run, "eval/loss")[0]


def scored(inputs: Path, tokenizer: str, folder: Path) -> float:
    argv = (
        f"--data={inputs}/validation/*.json.gz",
        f"--tokenizer={tokenizer}",
        "--data.sequence_length=32",
        "--max_tokens=200",
    )
    return json.loads(call(EVALUATE, folder, *argv).out.splitlines()[-1])["loss"]


@pytest.mark.parametrize("shape", ["llama3", "qwen2", *rest(("biased",), ("qwen3",), ("mixtral",))])
def test_the_first_loss_is_the_loss_of_the_folder(pools, inputs, tokenizer_path, tmp_path, shape):
    if shape == "qwen2":  # transformers accepts no other tokenizers next to such a model
        tokenizer_path = str(tmp_path / "tokenizer")
        save_bytes_tokenizer(Path(tokenizer_path))
    folder = save(tmp_path / "model", **SHAPES[shape])
    if shape == "mixtral":  # its files have other names than its parameters
        assert any("experts.0.w1" in name for name in load_file(folder / "model.safetensors"))
    loss = first_loss(pools, inputs, tokenizer_path, tmp_path / "run", folder)
    assert loss == pytest.approx(scored(inputs, tokenizer_path, folder), abs=1e-5)
    with pytest.MonkeyPatch.context() as patch:  # and of plain transformers, from unchunked logits
        patch.setattr("relora_mora.model.causal.head_scale", lambda lm: (False, None))
        assert loss == pytest.approx(scored(inputs, tokenizer_path, folder), abs=1e-5)


@pytest.mark.parametrize("kind", ["shards", "bin", "headless"])
def test_other_ways_to_save_weights(pools, inputs, tokenizer_path, tmp_path, kind):
    folder = tmp_path / "model"
    save(folder, torch.bfloat16, "10KB" if kind == "shards" else "5GB", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    if kind == "shards":
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    elif kind == "bin":
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
    else:
        weights = {name.removeprefix("model."): value for name, value in load_file(file).items()}
        assert "lm_head.weight" not in weights
        save_file(weights, file, metadata={"format": "pt"})
    loss = first_loss(pools, inputs, tokenizer_path, tmp_path / "run", folder)
    assert loss == pytest.approx(scored(inputs, tokenizer_path, folder), abs=1e-5)


@pytest.fixture
def refuses(runs, tmp_path) -> Callable[..., None]:
    """Asserts that weights of a folder are refused with all these parts in the message."""

    def check(folder: Path, *parts: str, overrides: dict[str, Any] | None = None) -> None:
        from relora_mora.train.begin.build import _foreign_weights

        model = {"init_from": str(folder), "overrides": overrides or {}}
        config = runs.config(tmp_path / "run", model=model)
        lm = empty_model(read_model_config(ModelConfig(config=config.model.config, overrides=overrides or {})))
        with pytest.raises(ValueError) as caught:
            _foreign_weights(config, lm, {name: p.shape for name, p in lm.named_parameters()})
        assert type(caught.value).__module__.startswith("relora_mora."), caught.value
        assert all(part in str(caught.value) for part in parts), str(caught.value)
        assert str(folder) in str(caught.value)

    return check


@each(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"num_attention_heads": 4, "head_dim": 6},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"tie_word_embeddings": True},
        {"vocab_size": 384},
    ],
)
def test_a_model_that_computes_something_else_is_refused(refuses, tmp_path, changes):
    folder = save(tmp_path / "model", **changes)
    refuses(folder, *(f"model.init_from: {key} is " for key in changes), "in model.config")


@each(
    ("changes", "message"),
    [
        ({"model_type": "gtp2"}, "model_type is 'gtp2', expected a causal language model of transformers"),
        ({}, "model_type is 'qwen2' in that model and 'llama' in model.config"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config is "),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "auto_map is "),
    ],
)
def test_another_architecture_is_refused(refuses, tmp_path, changes, message):
    folder = save(tmp_path / "model", model_type="qwen2", num_key_value_heads=2)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refuses(folder, message)


@each("harm", ["left over", "missing", "another shape", "nan", "own head"])
def test_weights_that_do_not_fit_their_config_are_refused(refuses, tmp_path, harm):
    folder = save(tmp_path / "model", tie_word_embeddings=harm == "own head")
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    messages: tuple[str, ...] = (name,)
    if harm == "left over":
        for layer in range(2):
            weights[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.ones(24)
        weights["v_head.weight"] = torch.ones(1, 24)
        messages = ("left over: model.layers.*.self_attn.q_proj.bias (2), v_head.weight",)
    elif harm == "missing":
        del weights[name]
    elif harm == "another shape":
        weights[name] = weights[name][:4].clone()
    elif harm == "nan":
        weights[name][3, 5] = float("nan")
        messages = ("not finite in model.layers.1.mlp.up_proj.weight",)
    else:
        weights["lm_head.weight"] = torch.ones(320, 24)
        messages = ("hold a different head",)
    save_file(weights, file, metadata={"format": "pt"})
    refuses(folder, *messages, overrides={"tie_word_embeddings": harm == "own head"})


def warnings_of(config: Config, stop_after: int) -> list[str]:
    """The warnings of a start about the weights that its settings name."""
    with mock.patch.object(log, "warning") as warning:  # the trainer replaces all handlers with its own
        train(config, stop_after)
    messages = [call.args[0] % call.args[1:] for call in warning.call_args_list]
    return [message for message in messages if message.startswith("model.")]


def test_a_run_without_initial_weights_reports_that_it_ignores_them(runs, pools, tmp_path):
    run = tmp_path / "run"
    given = save(tmp_path / "given")
    model = {"config": str(given / "config.json")}
    runs.train(run, stop_after=1, model=model, method={"name": "lora"})
    again = runs.config(run, model=model | {"init_from": str(given)}, method={"name": "lora"})
    [[warning]] = pools(1)(warnings_of, again, stop_after=2)
    assert warning.startswith("model.init_from: the run began with no model.init_from; it continues from ")
    with pytest.raises(CheckpointError, match=r"it began with no model\.init_from, so there is no base model"):
        export(run, tmp_path / "adapter", form="peft")
