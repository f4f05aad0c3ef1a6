"""Exports: what plain transformers does with them, what they contain, and what replaces a damaged tokenizer."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from relora_mora.checkpoint.layout import file_entry
from relora_mora.checkpoint.reader import CheckpointReader
from relora_mora.tokenizer.identity import save_tokenizer
from relora_mora.tokenizer.load import load_tokenizer
from relora_mora.weights.export import _name_rope, export, merged_model
from relora_mora.weights.foreign import foreign_config
from relora_mora.weights.generation import generation_config
from tests.tools.checkpoints import rewrite_manifest, write_checkpoint
from tests.tools.commands import EVALUATE, EXPORT, call, refused
from tests.tools.data_tools import write_shard
from tests.tools.each import each
from tests.tools.runs import LLAMA, checkpoint_at


@pytest.fixture
def checkpoint(run: Path) -> Path:
    return checkpoint_at(run, 5)


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(write_shard(tmp_path / "text" / "a.json", ["the rank of a merge", "one more matrix of the same rank"]))


# ---- what transformers does with it ------------------------------------------------------------------------------


def _always(tokenizer: Any, token: str) -> LlamaForCausalLM:
    """A model that always predicts the same token."""
    lm = LlamaForCausalLM(LlamaConfig(**LLAMA))
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            parameter.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        lm.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] = 1.0
    return lm


# how a template ends an answer, and the token at which generation stops besides EOS
ENDS = [
    ("{{ m.content }}<|im_end|>\n", "<|im_end|>"),
    ("{{ m.content }} <|im_end|>", "<|im_end|>"),
    ("{{ m.content + eos_token }}", None),
    ("{{ m.content }} the end", None),
    ("{{ raise_exception('no') }}", None),
]


def test_plain_generate_stops_at_further_ends_that_the_start_lists(hf_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hf_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>"]})
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    lm = _always(tokenizer, "<|eom_id|>")
    end = tokenizer.convert_tokens_to_ids("<|eom_id|>")
    lm.config.eos_token_id = [5, end]  # 5 is a word of this tokenizer
    export(write_checkpoint(tmp_path / "checkpoint", lm, tmp_path / "tokenizer"), tmp_path / "out")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert lm.generation_config.eos_token_id == [300, end]
    assert lm.config.eos_token_id == 300
    assert foreign_config(tmp_path / "out").eos_token_id == [300, end], "for a run that starts from it"
    assert lm.generate(torch.tensor([[5]]), max_new_tokens=5, do_sample=False).tolist() == [[5, end]]


@each("written,stop", ENDS)
def test_generate_stops_where_the_template_ends_an_answer(hf_tokenizer: Path, written: str, stop: str | None) -> None:
    tokenizer = load_tokenizer(hf_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = f"{{% for m in messages %}}{written}{{% endfor %}}"
    ends = generation_config(tokenizer, LlamaConfig(**LLAMA), None).eos_token_id
    assert ends == ([300, tokenizer.convert_tokens_to_ids(stop)] if stop else 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_has_the_logits_of_the_merged_model(
    run: Path, model: LlamaForCausalLM, tmp_path: Path, dtype: torch.dtype, device: torch.device
) -> None:
    checkpoint = export(run, tmp_path / "out", dtype)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out").to(device)
    ids = torch.arange(64, device=device).reshape(2, 32)
    with torch.no_grad():
        assert lm.dtype == dtype
        assert torch.equal(lm(ids).logits, merged_model(CheckpointReader(checkpoint), dtype).to(device)(ids).logits)
        if dtype == torch.float32:
            assert torch.equal(lm(ids).logits, copy.deepcopy(model).to(device)(ids).logits)


def test_every_form_of_a_model_has_the_same_loss(run: Path, checkpoint: Path, text: str, tmp_path: Path) -> None:
    exported = call(EXPORT, run, tmp_path / "float32")
    assert exported.code == 0
    assert f"convert_hf_to_gguf.py {tmp_path}/float32 --outfile model.gguf --outtype f32" in exported.out
    assert call(EXPORT, checkpoint, tmp_path / "bfloat16", "--dtype=bfloat16").code == 0
    losses = {}
    for path in (run, checkpoint, tmp_path / "float32", tmp_path / "bfloat16"):
        answer = call(EVALUATE, path, f"--data={text}", "--data.sequence_length=32")
        assert answer.code == 0, answer.err
        losses[path.name] = json.loads(answer.out.splitlines()[-1])["loss"]
    assert losses["run"] == losses[checkpoint.name] == losses["float32"] == pytest.approx(losses["bfloat16"], abs=1e-2)
    (checkpoint / "config.json").write_text(
        json.dumps({"model_type": "llama"})
    )  # a stray config does not make it a foreign model
    answer = call(EVALUATE, checkpoint, f"--data={text}", "--data.sequence_length=32")
    assert json.loads(answer.out.splitlines()[-1])["loss"] == losses["run"]
    refused(call(EXPORT, tmp_path / "float32", tmp_path / "again"), "not a checkpoint")
    assert not (tmp_path / "again").exists()


# ---- what it contains ---------------------------------------------------------------------------------------------


def test_an_export_takes_neither_code_nor_a_model_from_a_manifest(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "clean" / "out")
    names = [f"tokenizer/{name}" for name in ("model.safetensors", "config.json", "generation_config.json", "evil.py")]
    for name in names:
        (checkpoint / name).write_text('{"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "llama"}')
    code = {
        "auto_map": {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None]},
        "trust_remote_code": True,
    }
    settings = "tokenizer/tokenizer_config.json"
    (checkpoint / settings).write_text(json.dumps(json.loads((checkpoint / settings).read_text()) | code))
    kernels = {"quantization_config": {"quant_method": "evil"}, "attn_implementation": "evil/kernels"}

    def change(values: dict[str, Any]) -> None:
        values["model_config"] |= code | kernels
        values["files"] |= {name: asdict(file_entry(checkpoint / name)) for name in (*names, settings)}

    rewrite_manifest(checkpoint, change)
    export(checkpoint, tmp_path / "out")
    clean, after = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (tmp_path / "clean" / "out", tmp_path / "out")
    )
    assert after == clean


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "evil"}, "transformers cannot build a model from its model_config"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing, expected [24]"),
    ],
)
def test_a_manifest_with_another_model_gives_one_message(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    rewrite_manifest(checkpoint, lambda values: values["model_config"].update(change))
    refused(call(EXPORT, checkpoint, tmp_path / "out"), str(checkpoint), says)


def test_weights_that_a_type_cannot_hold_are_refused(
    model: LlamaForCausalLM, hf_tokenizer: Path, text: str, tmp_path: Path
) -> None:
    large = copy.deepcopy(model)
    with torch.no_grad():
        large.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    checkpoint = tmp_path / "step-00000005"
    write_checkpoint(checkpoint, large, hf_tokenizer)
    save_tokenizer(hf_tokenizer, checkpoint / "tokenizer")
    messages = (str(checkpoint), "too large for float16 in model.layers.1.mlp.up_proj.weight")
    refused(call(EXPORT, checkpoint, tmp_path / "out", "--dtype=float16"), *messages)
    refused(call(EVALUATE, checkpoint, f"--data={text}", "--precision=float16"), *messages)
    assert not (tmp_path / "out").exists()
    assert call(EXPORT, checkpoint, tmp_path / "out", "--dtype=bfloat16").code == 0


def test_a_tokenizer_has_the_class_name_that_older_readers_know(tokenizer_path: str, tmp_path: Path) -> None:
    """transformers 4 knows no TokenizersBackend, and takes a list of extra_special_tokens for a mapping."""
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>"]})
    save_tokenizer(tokenizer, tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] != "TokenizersBackend"
    assert "extra_special_tokens" not in written
    assert "<|eom_id|>" in written["additional_special_tokens"]
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert "<|eom_id|>" in read.all_special_tokens
    assert read.special_tokens_map == tokenizer.special_tokens_map


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}


@each(
    "scaling",
    [None, {"rope_type": "linear", "factor": 4.0}, LONG | {"factor": 2.0, "original_max_position_embeddings": 32}],
)
def test_rotary_embeddings_have_the_names_that_older_readers_know(scaling, tmp_path):
    """transformers 4 uses a base of 10,000 and no scaling if it finds neither key."""
    parameters = {"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})}
    config = LlamaConfig(**LLAMA | {"rope_parameters": parameters})
    config.save_pretrained(tmp_path)
    _name_rope(tmp_path / "config.json")
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (500000.0, scaling)
    length = "original_max_position_embeddings"
    assert written.get(length) == (scaling or {}).get(length)
    for read in (AutoConfig.from_pretrained(tmp_path), foreign_config(tmp_path)):
        assert dict(read.rope_parameters) == parameters
