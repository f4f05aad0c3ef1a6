"""Adapters without their model: ours in PEFT, adapters of PEFT and of the released MoRA here, and refusals."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from relora_mora.adapters.layers import adapter_layers
from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.tokenizer.identity import save_tokenizer
from relora_mora.tokenizer.load import load_tokenizer
from relora_mora.weights.export import export
from relora_mora.weights.load import find_model
from relora_mora.weights.peft import AdapterFolder, base_sample, is_other_base
from tests.tools.adapter_tools import (
    ADAPTERS_ONLY,
    METHODS,
    adapted,
    logits,
    save_base,
    write_adapter_folder,
    write_run,
)
from tests.tools.commands import EVALUATE, call, refused
from tests.tools.data_tools import write_shard
from tests.tools.each import each
from tests.tools.shared import SHARED, needs_shared

ROUNDING = 5e-5  # of logits of up to 5, which differ by 2.5e-5 on CPUs without AVX-512


@pytest.fixture(scope="session")
def peft() -> Any:
    return pytest.importorskip("peft", reason="PEFT is not installed (pip install '.[dev]')")


def exported(folder: Path, base: Path, tokenizer: str, method: dict[str, Any], form: str) -> Path:
    checkpoint = write_run(folder / "run", adapted(base, method), base, tokenizer, method)
    export(checkpoint, folder / form, form=form)
    return folder / form


# ---- PEFT ----------------------------------------------------------------------------------------------------------


@pytest.mark.more
@pytest.mark.parametrize(("name", "whole"), [*((name, False) for name in METHODS), ("lora", True), ("mora1", True)])
def test_peft_computes_what_the_run_does(peft, base, tokenizer_path, tmp_path, name, whole):
    method = METHODS[name] | ({} if whole else ADAPTERS_ONLY)
    lm = adapted(base, method)
    checkpoint = write_run(tmp_path / "run", lm, base, tokenizer_path, method)
    for form in ("merged", "peft"):
        export(checkpoint, tmp_path / form, form=form)
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "peft").eval()
    ours = logits(lm)
    assert (ours - logits(LlamaForCausalLM.from_pretrained(base))).abs().max() > 0.1
    assert (logits(theirs) - ours).abs().max() <= (0 if method["name"] == "lora" else ROUNDING)
    assert (logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged")) - ours).abs().max() < ROUNDING
    assert logits(find_model(tmp_path / "peft").read(torch.float32)).equal(
        logits(find_model(tmp_path / "merged").read(torch.float32))
    ) == (name != "mora6")  # its rotations are rounded once more
    assert AutoTokenizer.from_pretrained(tmp_path / "peft").vocab_size == 300
    modules = {"model.embed_tokens", "lm_head", "model.norm", "input_layernorm", "post_attention_layernorm"}
    assert set(theirs.peft_config["default"].modules_to_save or ()) == (modules if whole else set())
    for layer, module in adapter_layers(lm):
        values = [module.get_parameter(key).detach() for key in module.adapter_names]
        delta = theirs.get_submodule(f"base_model.model.{layer}").get_delta_weight("default")
        apart = (delta - module.delta_of(*values)).abs().max()
        exact = method["name"] == "mora" and name != "mora6"
        assert apart == 0 if exact else apart < 1e-6


@each("form", ["peft", "peft-mora"])
def test_an_answer_ends_where_the_merged_model_ends_it(base, tokenizer_path, tmp_path, form):
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    method = METHODS["mora1"] | ADAPTERS_ONLY
    checkpoint = write_run(tmp_path / "run", adapted(base, method), base, tmp_path / "tokenizer", method)
    export(checkpoint, tmp_path / "merged")
    export(checkpoint, tmp_path / form, form=form)

    def ends(folder):
        return find_model(folder).read(torch.float32).generation_config.eos_token_id

    expected = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert ends(tmp_path / "merged") == ends(tmp_path / form) == expected != ends(base)


@pytest.mark.more
@each("kind", ["mistral", "qwen2", "qwen3", "phi3", "gemma2", "mixtral", "gpt_neox"])
def test_peft_computes_what_a_run_of_another_family_does(peft, tokenizer_path, tmp_path, kind):
    base = save_base(tmp_path / "base", kind, tie_word_embeddings=True, pad_token_id=None)
    method = METHODS["mora1"] | ADAPTERS_ONLY | {"dropout": 0.1}
    lm = adapted(base, method)
    export(write_run(tmp_path / "run", lm, base, tokenizer_path, method), tmp_path / "peft", form="peft")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft").eval()
    assert theirs.peft_config["default"].lora_dropout == 0.1
    assert (logits(theirs) - logits(lm)).abs().max() < ROUNDING
    assert (logits(find_model(tmp_path / "peft").read(torch.float32)) - logits(lm)).abs().max() < ROUNDING


@each(
    "settings",
    [
        {"r": 3, "lora_alpha": 5},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {"r": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 3}},
        {"r": 2, "alpha_pattern": {"q.proj": 7, r"layers\.1\.mlp\..*|k_proj": 3}, "rank_pattern": {"(q|up)_proj": 5}},
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
        {"r": 2, "layers_to_transform": [1]},
    ],
)
def test_an_adapter_saved_by_peft_computes_the_same_here(peft, base, tokenizer_path, tmp_path, settings):
    targets = {"target_modules": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]}
    config = peft.LoraConfig(**(targets | settings), init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.02
    theirs.save_pretrained(tmp_path / "theirs")
    source = find_model(tmp_path / "theirs")  # whose base its config names
    assert source.checkpoint is None, "its scores are not its base's"
    assert (logits(theirs) - logits(LlamaForCausalLM.from_pretrained(base))).abs().max() > 0.1
    assert (logits(source.read(torch.float32)) - logits(theirs)).abs().max() < ROUNDING


def test_tied_embeddings_without_the_head_are_refused(peft, tmp_path):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    with pytest.raises(CheckpointError, match="changes the embeddings or the head of a model that ties them"):
        find_model(tmp_path / "theirs").read(torch.float32)


def test_a_whole_linear_keeps_its_frozen_bias(peft, tokenizer_path, tmp_path):
    """PEFT takes modules that were saved whole with all of their parameters."""
    base = save_base(tmp_path / "base", attention_bias=True)
    method = METHODS["lora"] | ADAPTERS_ONLY | {"target_modules": ["q_proj"], "train_linears": True}
    folder = exported(tmp_path, base, tokenizer_path, method, "peft")
    names = load_file(folder / "adapter_model.safetensors")
    kept = {name.split(".", 6)[6] for name in names if ".0.self_attn.k_proj." in name}
    assert kept == {"k_proj.weight", "k_proj.bias"}
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).eval()
    assert (logits(theirs) - logits(find_model(folder).read(torch.float32))).abs().max() < ROUNDING


# ---- the released MoRA ---------------------------------------------------------------------------------------------


def released_size(inputs: int, outputs: int, rank: float, mora_type: int) -> int:
    """R as the released code finds it (kongds/MoRA, peft-mora/src/peft/tuners/lora/layer.py, update_layer)."""
    size = int(math.sqrt((inputs + outputs) * rank) + 0.5)
    return size // 2 * 2 if mora_type == 6 else size


@each("name", [name for name in METHODS if METHODS[name]["name"] == "mora"])
def test_the_released_mora_finds_our_matrices(base, tokenizer_path, tmp_path, name):
    method = METHODS[name] | ADAPTERS_ONLY
    folder = exported(tmp_path, base, tokenizer_path, method, "peft-mora")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    operator = method["operators"][0]
    assert (config["peft_type"], config["use_mora"], config["mora_type"]) == ("LORA", True, operator)
    layers = dict(adapter_layers(adapted(base, method)))
    assert len(tensors) == 2 * len(layers) == 28
    for layer, module in layers.items():
        M = module.mora_M.detach()
        rank = config["rank_pattern"][layer.rpartition(".")[2]]
        assert released_size(module.in_features, module.out_features, rank, operator) == len(M)
        assert all(tensors[f"base_model.model.{layer}.lora_{each}.weight"].equal(M) for each in "AB")
    read = AdapterFolder(folder)
    assert read.mora_type == operator
    assert read.base == str(base)
    assert all(read.value(f"{layer}.mora_M").equal(module.mora_M) for layer, module in layers.items())
    export(tmp_path / "run", tmp_path / "merged")
    merged = logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged"))
    assert logits(find_model(folder).read(torch.float32)).equal(merged)


def test_the_written_rank_gives_the_size_of_every_square():
    for inputs, outputs in ((576, 576), (576, 192), (4096, 11008), (1, 1), (8192, 28672), (2048, 5461)):
        for size in range(1, 3000):
            assert released_size(inputs, outputs, size**2 / (inputs + outputs), 1) == size


@needs_shared
def test_an_adapter_saved_by_the_released_mora_computes_the_same_here(tmp_path):
    golden = np.load(SHARED / "golden" / "mora_operators.npz")
    for number, case in enumerate(sorted({key.split("/")[0] for key in golden.files})):
        kind = int(golden[f"{case}/type"])
        M = torch.from_numpy(golden[f"{case}/M"]).float()
        delta = torch.from_numpy(golden[f"{case}/delta"])
        folder = write_adapter_folder(tmp_path / str(number), {"use_mora": True, "mora_type": kind}, A=M, B=M.clone())
        with torch.device("meta"):
            layer = AdapterFolder(folder).layer_on("model.q", torch.nn.Linear(delta.shape[1], delta.shape[0]))
        assert (layer.delta_of(AdapterFolder(folder).value("model.q.mora_M")) - delta).abs().max() < 1e-5


# ---- evaluation ----------------------------------------------------------------------------------------------------


def test_a_square_of_another_model_is_recognized_by_its_rank(base, tokenizer_path, tmp_path):
    folder = exported(tmp_path, base, tokenizer_path, METHODS["mora1"] | ADAPTERS_ONLY, "peft-mora")
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    wide = save_base(tmp_path / "wide", intermediate_size=80)
    (tmp_path / "a.txt").write_text("text\n")
    refused(
        call(EVALUATE, folder, f"--base={wide}", f"--data={tmp_path}/a.txt"),
        f"{file}: model.layers.0.mlp.down_proj has an M of size 16",
        f"of {wide}; give the model that the adapter was trained on",
    )


def test_a_model_in_fewer_bits_is_the_same_and_a_trained_one_is_not():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 50
    noted = base_sample("w", weight)
    for dtype in (torch.bfloat16, torch.float16):
        assert not is_other_base(noted, {"w": weight.to(dtype)}.get)
    large = torch.zeros(5120, 5120, dtype=torch.bfloat16)
    noted_zeros = base_sample("w", large)
    large[-1, -1] = 1.0
    assert is_other_base(noted_zeros, {"w": large}.get)
    changed = weight + 0.01 * weight.std() * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    assert is_other_base(noted, {"w": changed}.get)


@each("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_model_equals_the_merged_export(base, tokenizer_path, tmp_path, dtype):
    """Also between the weights: rotary frequencies stay in float32."""
    folder = exported(tmp_path, base, tokenizer_path, METHODS["lora"] | ADAPTERS_ONLY, "peft")
    export(tmp_path / "run", tmp_path / "merged")
    found = find_model(folder).read(dtype)
    expected = find_model(tmp_path / "merged").read(dtype)
    for (name, value), (_, other) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(value, other) and value.dtype == torch.float32, name
    assert torch.equal(logits(found), logits(expected))


def test_an_adapter_is_scored_on_its_base(base, tokenizer_path, tmp_path):
    text = write_shard(tmp_path / "text" / "a.json", ["the rank of a merge", "one more matrix of the same rank"])
    folder = exported(tmp_path, base, tokenizer_path, METHODS["mora1"] | ADAPTERS_ONLY, "peft")
    export(tmp_path / "run", tmp_path / "merged")
    losses = []
    described = shutil.copytree(folder, tmp_path / "described")
    shutil.copy(base / "config.json", described)
    for arguments in ([tmp_path / "merged"], [folder], [folder, f"--base={base}"], [described]):
        answer = call(EVALUATE, *arguments, f"--data={text}", "--data.sequence_length=32")
        assert answer.code == 0, answer.err
        losses.append(json.loads(answer.out.splitlines()[-1])["loss"])
    assert len(set(losses)) == 1
    refused(call(EVALUATE, folder), "--data")
    refused(call(EVALUATE, base, f"--base={base}", f"--data={text}"), "--base", "is not an adapter without its model")
    file = folder / "adapter_model.safetensors"
    other = save_base(tmp_path / "other", seed=8)
    refused(
        call(EVALUATE, folder, f"--base={other}", f"--data={text}"),
        f"{file}: was trained on other weights than {other} has; give the model that it was trained on ({base})",
    )
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"base_model_name_or_path": str(other)}))
    refused(call(EVALUATE, folder, f"--data={text}"), f"other weights than {other} has; it has changed since")
    config.write_text(json.dumps(settings))
    save_file(load_file(file), file, metadata={"format": "pt"})  # as PEFT writes it
    narrow = save_base(tmp_path / "narrow", intermediate_size=32)
    refused(
        call(EVALUATE, folder, f"--base={narrow}", f"--data={text}"),
        f"{file}: model.layers.0.mlp.down_proj.lora_A is [16, 40]",
        f"{narrow} has [16, 32]",
    )
    config.write_text(json.dumps(settings | {"base_model_name_or_path": "some/model"}))
    refused(call(EVALUATE, folder, f"--data={text}"), "its model some/model is not a folder here", "--base")
