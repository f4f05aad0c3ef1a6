"""What an export says about itself: its card, the settings of ``generate``, its files, and what llama.cpp needs."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from relora_mora.weights.export import export
from relora_mora.weights.generation import generation_file
from tests.tools.checkpoints import rewrite_manifest, write_checkpoint
from tests.tools.commands import EXPORT, call
from tests.tools.runs import checkpoint_at

CACHED = "cache/models--HuggingFaceTB--SmolLM2-135M/snapshots/c0ffee"


def card_of(folder: Path) -> tuple[str, dict]:
    text = (folder / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    return header + body, yaml.safe_load(header)


def test_a_card_has_the_figures_of_the_run_folder_and_no_others(run: Path, tmp_path: Path) -> None:
    export(checkpoint_at(run, 5), tmp_path / "bare")
    text, header = card_of(tmp_path / "bare")
    assert "perplexity" not in text and "parameters" not in text and "text seen" not in text
    assert "license" not in header and "language" not in header and "base_model" not in header
    assert "# license:" in text and "**License:**" in text
    rewrite_manifest(checkpoint_at(run, 5), lambda values: values["counters"].update(tokens=40960))
    (run / "starts.jsonl").write_text(json.dumps({"parameters": {"total": 4321, "trainable": 321}}) + "\n")
    metrics = {"eval/a/tokens": 4096, "eval/a/bits_per_byte": 0.2}
    lines = [{"step": step, "eval/a/perplexity": 100 - step, **metrics} for step in (0, 4, 9)]
    (run / "metrics.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, lines))))
    export(run, tmp_path / "out")
    text, _ = card_of(tmp_path / "out")
    assert "| parameters | 4,321, of which 321 trained |" in text
    assert "| training text seen | 40,960 tokens |" in text
    assert "at step 4" in text and "| a | 4,096 | 96.00 | 0.2000 |\n\n" in text, "not of step 9, which came later"


def test_a_card_names_base_and_text_without_secrets_or_paths(
    model: LlamaForCausalLM, hf_tokenizer: Path, tmp_path: Path
) -> None:
    train = [
        {"source": "/home/me/secret/books.jsonl", "name": "books"},
        {"source": "hub:allenai/c4/en/*.gz", "weight": 3.0},
    ]
    data = {"train": train, "validation": "a.json", "commits": {"allenai/c4@main": "c" * 40}}
    folder = write_checkpoint(
        tmp_path / "checkpoint", model, hf_tokenizer, data=data, model={"config": None, "init_from": CACHED}
    )
    export(folder, tmp_path / "out")
    text, header = card_of(tmp_path / "out")
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert header["datasets"] == ["allenai/c4"]
    assert "`secret/books.jsonl` (weight 1)" in text and "/home/me" not in text


def test_generate_keeps_the_settings_of_the_base(run: Path, tmp_path: Path) -> None:
    base = {"temperature": 0.6, "repetition_penalty": 1.05, "eos_token_id": 7, "pad_token_id": 8}
    (run / "generation_config.json").write_text(json.dumps(base))
    assert generation_file(str(run)) == generation_file(str(checkpoint_at(run, 5))) == run / "generation_config.json"
    assert generation_file(str(tmp_path)) is None
    export(run, tmp_path / "out")
    kept = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (kept.temperature, kept.repetition_penalty) == (0.6, 1.05)
    assert (kept.eos_token_id, kept.pad_token_id) == (300, 301), "of the run's tokenizer"
    (run / "generation_config.json").write_text("[]")
    assert call(EXPORT, run, tmp_path / "other").code == 2


def test_large_models_are_written_in_several_files(run: Path, model: LlamaForCausalLM, tmp_path: Path) -> None:
    export(run, tmp_path / "out", shard_gb=3e-5)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_llama_cpp_can_convert_an_export(model: LlamaForCausalLM, tokenizer_path: str, tmp_path: Path) -> None:
    export(write_checkpoint(tmp_path / "checkpoint", model, tokenizer_path), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").is_file(), "tried first, and needs no list of known tokenizers"
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: make test-extras")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    assert [name for name in model.state_dict() if names.get_name(name, try_suffixes=(".weight",)) is None] == []
