"""Configs from the hub: the model that each makes, and the keys that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.load import validate
from relora_mora.config.schema import ModelConfig
from relora_mora.model.config import plain_model_config
from relora_mora.model.config_keys import LLAMA_FAMILY
from relora_mora.optim.groups import count_parameters
from relora_mora.sizing.work import meta_model
from relora_mora.weights.load import model_config_of
from tests.tools.config_tools import tree
from tests.tools.each import each

# (parameters with tied heads counted once, config.json without the keys in OF_ALL); compared with copies of these files
# that others have uploaded to the hub
HUB: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.2-1B-Instruct": (
        1_235_814_400,
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_size": 2048,
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
            "vocab_size": 128256,
        },
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": 151643,
            "eos_token_id": 151643,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
}
OF_ALL = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
}


@each("name", HUB)
def test_a_config_from_the_hub_makes_its_model(tmp_path: Path, name: str) -> None:
    parameters, values = HUB[name]
    (tmp_path / "config.json").write_text(json.dumps(OF_ALL | values))
    config = model_config_of(ModelConfig(init_from=str(tmp_path)))
    method = validate(tree(method={"name": "full"}), "the test").method
    assert count_parameters(meta_model(config, method)).total == parameters
    kept = plain_model_config(config)
    same = {key: value for key, value in values.items() if key in kept and "sliding_window" not in key}
    assert {key: kept[key] for key in same} == same
    assert config.rope_parameters["rope_theta"] == values["rope_theta"]
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    assert kept.get("sliding_window") == window


def test_overrides_apply_to_the_config_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OF_ALL | HUB["Qwen3-0.6B"][1]))
    settings = ModelConfig(init_from=str(tmp_path), overrides={"attention_dropout": 0.1})
    assert model_config_of(settings).attention_dropout == 0.1


@each("kind", LLAMA_FAMILY)
def test_only_adapters_train_if_everything_else_is_frozen(kind: str) -> None:
    """Biases and the norms of queries and keys are frozen too."""
    frozen = {"train_embeddings": False, "train_norms": False, "train_head": False}
    method = validate(tree(method={"name": "mora", "rank": 3, **frozen}), "the test").method
    model = meta_model(CONFIG_MAPPING[kind](num_hidden_layers=1), method)
    names = {f"{name}.{key}" for name, layer in adapter_layers(model) for key in layer.adapter_names}
    assert len(names) == 7
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
