"""Every key of a model's config is honored, kept for the export, left out, or refused with a remedy."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import ModelConfig
from relora_mora.model.causal import LossModel, build_model
from relora_mora.model.config import keys_with, plain_model_config, read_model_config
from relora_mora.model.config_keys import FUNCTION, LLAMA_FAMILY, TRAINING
from tests.tools.each import each
from tests.tools.tiny import batch

TINY = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "model.json").write_text(json.dumps(TINY))
    return tmp_path / "model.json"


def read(path: Path, **overrides: Any) -> LlamaConfig:
    return read_model_config(ModelConfig(config=str(path), overrides=overrides))


def loss_of(config: LlamaConfig) -> float:
    """The loss with weights that depend only on the seed, in training mode so that dropout applies."""
    model = LossModel(build_model(config, seed=3)).train()
    torch.manual_seed(0)
    return model(*batch(0)).item()


def rope(kind: str, theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **values}


@each(
    "overrides",
    [
        {"vocab_size": 80},
        {"hidden_size": 32},
        {"intermediate_size": 44},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 8},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 0.1},
        {"tie_word_embeddings": True},
        {"rope_theta": 10.0},
        {"rope_parameters": rope("default", 10.0)},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=8)},
        {"rope_parameters": rope("longrope", short_factor=[2.0] * 6, long_factor=[3.0] * 6)},
        {"attention_dropout": 0.5},
        {"initializer_range": 0.1},
    ],
)
def test_honored_keys_change_the_loss(path: Path, overrides: dict[str, Any]) -> None:
    plain = loss_of(read(path, initializer_range=0.05))
    assert loss_of(read(path, **{"initializer_range": 0.05, **overrides})) != plain


def test_bias_keys_add_biases(path: Path) -> None:
    for bias, count in (("attention_bias", 8), ("mlp_bias", 6)):
        names = [name for name, _ in build_model(read(path, **{bias: True}), seed=0).named_parameters()]
        assert len([name for name in names if name.endswith(".bias")]) == count


@each("token", [None, 2, -1, 63])
def test_no_embedding_is_frozen_for_padding(path: Path, token: int | None) -> None:
    """Text is packed, so the end of a document is a token like any other, even if the tokenizer pads with it."""
    config = read(path, pad_token_id=token)
    model = build_model(config, seed=0)
    row = model.model.embed_tokens.weight
    assert (row.abs().sum(1) > 0).all()
    ids = torch.full((1, 8), 63 if token == -1 else token or 0)
    LossModel(model)(ids, ids).backward()
    assert row.grad is not None
    assert row.grad[ids[0, 0]].any()
    assert config.pad_token_id == (None if token == -1 else token)


def test_keys_without_effect_in_training_are_kept_for_the_export(path: Path) -> None:
    values = {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8, "unk_token_id": 9, "pretraining_tp": 2}
    kept = plain_model_config(read(path, **values))
    assert {key: kept[key] for key in values} == values


def test_keys_that_do_not_describe_the_model_are_left_out(path: Path) -> None:
    noise = {
        "_name_or_path": "x",
        "architectures": ["LLaMAForCausalLM"],
        "torch_dtype": "float16",
        "dtype": "no such",
        "transformers_version": "3",
        "use_cache": True,
        "temperature": 0.6,
        "max_length": 4096,
        "id2label": "x",
        "unsloth_version": "2025",
        "transformers.js_config": {},
        "a_key_of_a_fork": None,
        "quantization_config": None,
        "model_type": None,
        "sliding_window": None,
    }
    assert plain_model_config(read(path, **noise)) == plain_model_config(read(path))


MISTRAL, QWEN2, QWEN3 = ({"model_type": kind, "num_key_value_heads": 1} for kind in ("mistral", "qwen2", "qwen3"))
FULL, SLIDING = "full_attention", "sliding_attention"
REFUSED: list[tuple[str, dict[str, Any]]] = [  # (what the message must name, overrides)
    ("hiden_size LlamaConfig", {"hiden_size": 24}),
    ("logit_scale Qwen3Config", {**QWEN3, "logit_scale": 2.0}),
    ("model_type gtp2", {"model_type": "gtp2"}),
    ("architectures Qwen2ForCausalLM", {"architectures": ["Qwen2ForCausalLM"]}),
    # rotary embeddings
    ("rope_theta 10000.0 500.0", {"rope_theta": 500.0, "rope_parameters": rope("default")}),
    (
        "rope_type default linear",
        {"rope_parameters": rope("default"), "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    ("rope_type mrope", {"rope_parameters": rope("mrope")}),
    ("rope_parameters linear", {"rope_parameters": "linear"}),
    ("factor linear", {"rope_parameters": {"rope_type": "linear"}}),
    ("factor '2'", {"rope_parameters": rope("linear", factor="2")}),
    ("rope_theta -5", {"rope_parameters": rope("default", -5)}),
    ("LlamaConfig rope_parameters", {"rope_parameters": rope("yarn", 1, factor=2)}),
    ("short_factor 1 6", {"rope_parameters": rope("longrope", short_factor=[1.0], long_factor=[1.0] * 6)}),
    (
        "original_max_position_embeddings 16 8",
        {
            "rope_parameters": rope("yarn", factor=2.0, original_max_position_embeddings=8),
            "original_max_position_embeddings": 16,
        },
    ),
    ("partial_rotary_factor LlamaConfig", {"partial_rotary_factor": 0.5}),
    # numbers
    ("max_sequence_length LlamaConfig", {"max_sequence_length": 32}),
    ("pad_token_id 99999 64", {"pad_token_id": 99999}),
    ("attention_dropout 5", {"attention_dropout": 5}),
    ("hidden_act prelu", {"hidden_act": "prelu"}),
    ("head_dim 3", {"hidden_size": 24, "num_attention_heads": 8}),
    ("head_dim None", {**QWEN3, "head_dim": None}),
    ("hidden size attention heads", {"num_attention_heads": 5, "num_key_value_heads": 5}),
    ("num_key_value_heads 3", {"num_key_value_heads": 3}),
    ("num_attention_heads 2.0", {"num_attention_heads": 2.0}),
    ("vocab_size 0", {"vocab_size": 0}),
    ("matrix elements", {"hidden_size": 2**20, "intermediate_size": 2**24}),
    ("num_hidden_layers 1000000 4096", {"num_hidden_layers": 10**6}),
    # what this kind of model or this trainer does not have
    ("is_encoder_decoder True", {"is_encoder_decoder": True}),
    ("attn_implementation model.attention", {"attn_implementation": "eager"}),
    ("quantization_config", {"quantization_config": {"bits": 4}}),
    ("sliding_window LlamaConfig", {"sliding_window": 16}),
    ("attention_bias MistralConfig", {**MISTRAL, "attention_bias": True}),
    ("layer_types num_hidden_layers", {**QWEN2, "layer_types": [FULL] * 5}),
]


@each(("named", "overrides"), REFUSED)
def test_values_that_cannot_be_honored_are_refused(path: Path, named: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(path, **overrides)
    assert any(all(part in fault for part in named.split()) for fault in caught.value.faults), caught.value
    assert str(path) in caught.value.source


def test_all_faults_are_named_together(path: Path) -> None:
    wrong = {"hiden_size": 8, "hidden_size": "8", "rms_norm_eps": 0, "hidden_act": "no such", "sliding_window": 8}
    with pytest.raises(ConfigError) as caught:
        read(path, **wrong)
    assert {key for key in wrong for fault in caught.value.faults if f"model: {key}" in fault} == set(wrong)
    assert len(caught.value.faults) == len(wrong)


def test_without_a_number_of_key_heads_there_are_as_many_as_attention_heads(path: Path) -> None:
    for model_type, heads in itertools.product(LLAMA_FAMILY, (1, 2)):
        values = {"num_attention_heads": heads, "num_key_value_heads": None, "head_dim": 8}
        assert read(path, model_type=model_type, **values).num_key_value_heads == heads


def test_two_names_of_one_value_are_unified(path: Path) -> None:
    plain = plain_model_config(read(path))
    assert plain_model_config(read(path, rope_theta=10000, rope_parameters=rope("default"), rope_scaling=None)) == plain
    yarn = {"type": "yarn", "factor": 4.0}
    inside = keys_with(read(path, rope_scaling={**yarn, "original_max_position_embeddings": 8}), FUNCTION)
    assert keys_with(read(path, rope_scaling=yarn, original_max_position_embeddings=8), FUNCTION) == inside


@pytest.mark.parametrize("kind", LLAMA_FAMILY)
def test_a_written_config_reads_back_the_same(path: Path, kind: str) -> None:
    overrides = {
        "model_type": kind,
        "num_key_value_heads": 1,
        "sliding_window": 16 if kind == "mistral" else None,
        "pad_token_id": 3,
        "rope_parameters": rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    }
    config = read(path, **overrides)
    path.write_text(json.dumps(plain_model_config(config)))
    assert plain_model_config(read(path)) == plain_model_config(config)


def test_keys_without_effect_in_a_manifest_do_not_stop_a_resume(path: Path) -> None:
    """The manifest has keys that never had an effect; the resumed run leaves them out."""
    ignored = {
        "max_sequence_length": 16,
        "pad_token_id": -1,
        "output_hidden_states": True,
        "_attn_implementation_internal": None,
    }
    old = LlamaConfig(**{**plain_model_config(read(path)), **ignored})
    assert keys_with(old, FUNCTION, TRAINING) == keys_with(read(path), FUNCTION, TRAINING)
    old.rms_norm_eps = 1e-5
    assert keys_with(old, FUNCTION, TRAINING) != keys_with(read(path), FUNCTION, TRAINING)
