"""Every key of a model's config is honored, kept for the export, left out, or refused with a remedy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.load import ConfigError, validate
from relora_mora.config.schema import MethodConfig, ModelConfig
from relora_mora.model.causal import LossModel, build_model
from relora_mora.model.config import (
    LLAMA_FAMILY,
    check_length,
    compared_keys,
    plain_model_config,
    read_model_config,
)
from relora_mora.optim.groups import count_parameters
from relora_mora.sizing.work import meta_model
from relora_mora.weights.load import model_config_of
from tests.tools.any_model import KINDS, any_config
from tests.tools.config_tools import tree
from tests.tools.each import each
from tests.tools.tiny import tiny_llama

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


def rope(kind: str, theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **values}


# ---- what is honored -------------------------------------------------------------------------------------------------

YARN = {"type": "yarn", "factor": 4.0}


@each(
    "given,parameters",
    [
        ({"rope_theta": 10.0}, rope("default", 10.0)),
        ({"rope_theta": 10000, "rope_parameters": rope("default"), "rope_scaling": None}, rope("default")),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, rope("linear", factor=4.0)),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 8},
            rope("yarn", factor=4.0, original_max_position_embeddings=8),
        ),
        ({"rope_scaling": YARN}, rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    ],
)
def test_older_names_of_rotary_embeddings_are_honored(
    path: Path, given: dict[str, Any], parameters: dict[str, Any]
) -> None:
    assert compared_keys(read(path, **given))["rope_parameters"] == parameters


def test_null_means_what_it_means_in_transformers(path: Path) -> None:
    """Mistral's window is 4096 without the key; null is no window."""
    assert read(path, model_type="mistral", num_key_value_heads=2, sliding_window=None).sliding_window is None
    assert read(path, num_key_value_heads=None).num_key_value_heads == 2
    qwen = {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": False}
    assert read(path, **qwen, sliding_window=16).sliding_window is None


@each("token", [None, 2, 63])
def test_no_embedding_is_frozen_for_padding(path: Path, token: int | None) -> None:
    """Text is packed, so the end of a document is a token like any other, even if the tokenizer pads with it."""
    model = build_model(read(path, pad_token_id=token), seed=0)
    row = model.model.embed_tokens.weight
    assert (row.abs().sum(1) > 0).all()
    ids = torch.full((1, 8), token or 0)
    LossModel(model)(ids, ids).backward()
    assert row.grad is not None
    assert row.grad[ids[0, 0]].any()


def test_keys_without_effect_are_kept_for_the_export_or_left_out(path: Path) -> None:
    kept = {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8, "unk_token_id": 9, "pretraining_tp": 2}
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
        "transformers.js_config": {},
        "a_key_of_a_fork": None,
        "quantization_config": None,
        "model_type": None,
        "sliding_window": None,
    }
    assert plain_model_config(read(path, **kept, **noise)) == plain_model_config(read(path)) | kept


# the config.json of Llama-3.2-1B-Instruct, compared with a copy that others have uploaded to the hub
HUB: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def test_a_config_from_the_hub_makes_its_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    config = model_config_of(ModelConfig(init_from=str(tmp_path), overrides={"attention_dropout": 0.1}))
    assert count_parameters(meta_model(config, MethodConfig(name="full"))).total == 1_235_814_400
    assert config.rope_parameters == HUB["rope_scaling"] | {"rope_theta": 500000.0}
    kept = plain_model_config(config)
    assert kept == kept | {key: HUB[key] for key in HUB if key in kept} | {"attention_dropout": 0.1, "use_cache": False}


# ---- what is refused -------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any]]] = [  # (what the message must name, overrides)
    ("hiden_size LlamaConfig", {"hiden_size": 24}),
    ("logit_scale Qwen3Config", {"model_type": "qwen3", "logit_scale": 2.0}),
    # rotary embeddings
    ("rope_theta 10000.0 500.0", {"rope_theta": 500.0, "rope_parameters": rope("default")}),
    (
        "rope_type default linear",
        {"rope_parameters": rope("default"), "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    ("rope_type mrope", {"rope_parameters": rope("mrope")}),
    ("factor '2'", {"rope_parameters": rope("linear", factor="2")}),
    ("rope_theta -5", {"rope_parameters": rope("default", -5)}),
    (
        "original_max_position_embeddings 16 8",
        {
            "rope_parameters": rope("yarn", factor=2.0, original_max_position_embeddings=8),
            "original_max_position_embeddings": 16,
        },
    ),
    # numbers
    ("Padding_idx num_embeddings", {"pad_token_id": 99999}),
    ("attention_dropout 5", {"attention_dropout": 5}),
    ("head_dim 3", {"hidden_size": 24, "num_attention_heads": 8}),
    ("hidden size attention heads", {"num_attention_heads": 5, "num_key_value_heads": 5}),
    ("num_key_value_heads 3", {"num_key_value_heads": 3}),
    ("num_attention_heads 2.0", {"num_attention_heads": 2.0}),
    ("vocab_size 0", {"vocab_size": 0}),
    ("allocate memory", {"hidden_size": 2**20, "intermediate_size": 2**24}),
    # what this kind of model or this trainer does not have
    ("is_encoder_decoder True", {"is_encoder_decoder": True}),
    ("attn_implementation model.attention", {"attn_implementation": "eager"}),
    ("sliding_window LlamaConfig", {"sliding_window": 16}),
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


@each(
    "text,message",
    [
        (None, r"cannot read .*model\.json \(No such file or directory\)"),
        ("[1]", r"holds a list, expected an object; give the config\.json"),
        ("{", "not JSON"),
    ],
)
def test_a_file_that_is_not_a_config_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "model.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_model_config(ModelConfig(config=str(tmp_path / "model.json")))
    with pytest.raises(ConfigError, match="did you mean llama_7b"):
        read_model_config(ModelConfig(config="llama_8b"))


def test_sequences_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.sequence_length: 16 is more than the model's max_position_embeddings"):
        check_length(tiny_llama(max_position_embeddings=8), 16, "unused.json")


# ---- what follows from it --------------------------------------------------------------------------------------------


def test_keys_without_effect_in_a_manifest_do_not_stop_a_resume(path: Path) -> None:
    """The manifest has keys that never had an effect; the resumed run leaves them out."""
    ignored = {"max_sequence_length": 16, "pad_token_id": -1, "output_hidden_states": True}
    old = LlamaConfig(**{**plain_model_config(read(path)), **ignored})
    assert compared_keys(old, training=True) == compared_keys(read(path), training=True)
    old.rms_norm_eps = 1e-5
    assert compared_keys(old, training=True) != compared_keys(read(path), training=True)


@each("kind", [*LLAMA_FAMILY, "gpt_oss", "phi"])
def test_only_adapters_train_if_everything_else_is_frozen(kind: str) -> None:
    """Biases, sinks, and the norms of queries and keys are frozen too."""
    frozen = {"train_embeddings": False, "train_norms": False, "train_head": False}
    method = validate(tree(method={"name": "mora", "rank": 3, **frozen}), "the test").method
    model = meta_model(any_config(kind, num_hidden_layers=1), method)
    names = {f"{name}.{key}" for name, layer in adapter_layers(model) for key in layer.adapter_names}
    assert len(names) == KINDS[kind]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
