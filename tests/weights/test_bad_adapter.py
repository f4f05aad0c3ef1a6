"""Adapters that are refused, each with one message."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.weights.peft import AdapterFolder
from tests.tools.adapter_tools import ADAPTERS_ONLY, METHODS, adapted, save_base, write_adapter_folder
from tests.tools.checkpoints import write_checkpoint
from tests.tools.commands import EXPORT, call, refused
from tests.tools.each import each

GOOD = {"A": torch.ones(2, 5), "B": torch.ones(3, 2)}
SQUARE = {"use_mora": True, "mora_type": 1}


@each(
    ("settings", "factors", "says"),
    [
        ({"peft_type": "IA3"}, GOOD, "peft_type is 'IA3'"),
        ({"use_dora": True}, GOOD, "use_dora: not supported here"),
        ({"new_kind": {"of": "adapter"}}, GOOD, "new_kind: not supported here"),
        ({"bias": "all"}, GOOD, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, GOOD, "init_lora_weights is 'pissa'"),
        ({"lora_alpha": "much"}, GOOD, "lora_alpha is 'much'"),
        ({"alpha_pattern": {"*_proj": 4}}, GOOD, "alpha_pattern is not a regular expression"),
        ({"rank_pattern": {"(q_proj": 4}}, GOOD, "alpha_pattern is not a regular expression"),
        ({}, {"A": torch.ones(2, 5)}, "model.q has [2, 5] and [], expected A [r, in] and B [out, r]"),
        ({}, {"A": torch.ones(2, 5), "B": torch.ones(3, 4)}, "model.q has [2, 5] and [3, 4]"),
        ({}, GOOD | {"magnitude_vector": torch.ones(3)}, "not a tensor of LoRA or MoRA"),
        ({}, {"A": torch.ones(2, 5, dtype=torch.int8), "B": GOOD["B"]}, "not a tensor of LoRA or MoRA"),
        ({}, {}, "no layer has an adapter"),
        (SQUARE | {"mora_type": 5}, {"A": torch.ones(2, 2)}, "mora_type is 5"),
        (SQUARE | {"mora_type": 7}, {"A": torch.ones(2, 2)}, "mora_type is 7: Input should be 1, 2, 3, 4 or 6"),
        (SQUARE, {"A": torch.ones(2, 3)}, "model.q has [2, 3] and [2, 3], expected M [R, R]"),
        (SQUARE | {"mora_type": 6}, {"A": torch.ones(3, 3)}, "expected M [R, R] with an even R"),
    ],
)
def test_a_folder_that_is_not_an_adapter_gives_one_message(tmp_path, settings, factors, says):
    folder = write_adapter_folder(tmp_path / "adapter", settings, **factors)
    with pytest.raises(CheckpointError) as caught:
        AdapterFolder(folder)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)


def test_numbers_that_are_not_finite_give_one_message(tmp_path):
    M = torch.full((2, 2), math.nan)
    folder = write_adapter_folder(tmp_path / "adapter", SQUARE, A=M, B=M.clone())
    with pytest.raises(CheckpointError, match="not finite"):
        AdapterFolder(folder).value("model.q.mora_M")


@each("harm", ["config", "list", "gone", "pickle"])
def test_unreadable_files_give_one_message(tmp_path, harm):
    folder = write_adapter_folder(tmp_path / "adapter", {}, **GOOD)
    if harm in ("config", "list"):
        (folder / "adapter_config.json").write_text("[]" if harm == "list" else "{")
    else:
        file = folder / "adapter_model.safetensors"
        file.unlink()
        if harm == "pickle":
            torch.save(GOOD, file)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        AdapterFolder(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.more
@pytest.mark.parametrize(
    ("form", "method", "changes", "says"),
    [
        ("peft", {"name": "full"}, {}, "full trains without adapters"),
        ("peft", METHODS["lora"] | ADAPTERS_ONLY, {"model": {}}, "with no model.init_from, so there is no base model"),
        ("peft", METHODS["mora1"] | ADAPTERS_ONLY, {"merges_done": 1}, "1 merge changed the base weights"),
        ("peft-mora", METHODS["lora"] | ADAPTERS_ONLY, {}, "not known to the released MoRA"),
        ("peft", METHODS["lora"], {"attention_bias": True}, "biases of layers with adapters were trained"),
        ("peft", METHODS["lora"], {"tie_word_embeddings": True}, "it trained embeddings that are also the head"),
    ],
)
def test_a_run_that_trains_more_than_its_adapter_is_refused(tokenizer_path, tmp_path, form, method, changes, says):
    of_model = {key: changes[key] for key in changes if key in ("attention_bias", "tie_word_embeddings")}
    base = save_base(tmp_path / "base", **of_model)
    lm = adapted(base, method) if method["name"] != "full" else LlamaForCausalLM.from_pretrained(base)
    checkpoint = tmp_path / "run"
    of_run = {"model": {"init_from": str(base)}} | {key: value for key, value in changes.items() if key not in of_model}
    operator = method["operators"][0] if method["name"] == "mora" else None
    write_checkpoint(checkpoint, lm, tokenizer_path, operator=operator, method=method, **of_run)
    refused(call(EXPORT, checkpoint, tmp_path / "out", f"--format={form}"), says, "--format=merged")
    assert not (tmp_path / "out").exists()
