"""Tokens that are added to a tokenizer, and to a model: what stays, what trains, and what an export holds."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from relora_mora.config.load import ConfigError
from relora_mora.tokenizer.extend import Extension
from relora_mora.tokenizer.load import load_tokenizer
from relora_mora.weights.vocabulary import with_vocabulary
from tests.tools.commands import EXPORT, call
from tests.tools.each import each
from tests.tools.runs import LLAMA, different_tensors, refusal_of, run_config, train
from tests.tools.tokenizer_tools import TEXT

OLD, NEW = 300, 312
ROWS = {"new_tokens": "mean_of_pieces"}
ONLY_NEW = {"train_embeddings": "new", "train_head": False}


def base_model(folder: Path, tokenizer: str | Path, vocab_size: int = OLD, **changes: Any) -> Path:
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": vocab_size} | changes)).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def extended(tokenizer_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extended")
    extension = Extension(tokenizer_path)
    extension.learn(TEXT * 2, NEW - OLD)
    extension.save(folder, TEXT)
    return folder


def settings(inputs: Path, base: Path, tokenizer: Path | str, run: Path, ranks: int = 1, **sections: Any) -> Any:
    model = {"config": None, "init_from": str(base), **ROWS, **sections.pop("model", {})}
    method = {**ONLY_NEW, **sections.pop("method", {})}
    return run_config(inputs, str(tokenizer), run, ranks, model=model, method=method, **sections)


def ends(folder: Path) -> dict[str, torch.Tensor]:
    """Embeddings and head of an exported model."""
    weights = load_file(folder / "model.safetensors")
    return {name: weights[name] for name in ("model.embed_tokens.weight", "lm_head.weight") if name in weights}


@pytest.mark.distributed
@each(
    "ranks, stage, precision, tied",
    [(1, 0, "fp32", False), (2, 1, "bf16", False), (2, 2, "fp32", True), (2, 3, "fp32", False)],
)
def test_only_new_rows_move_and_the_rest_is_as_before(
    pools, inputs, tokenizer_path, extended, tmp_path, ranks, stage, precision, tied
):
    base = base_model(tmp_path / "base", tokenizer_path, tie_word_embeddings=tied)
    given = {"zero_stage": stage, "precision": precision, "steps": 6}
    config = settings(inputs, base, extended, tmp_path / "run", ranks, optim={"weight_decay": 0.5}, train=given)
    pools(ranks)(train, config)
    assert call(EXPORT, tmp_path / "run", tmp_path / "out").code == 0
    before, after = ends(base), ends(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.shape[0] == 320, "padded to a multiple of 64"
        assert torch.equal(weight[:OLD], before[name]), name
        start = before[name].mean(0)
        assert (weight[OLD:NEW] != start).any(1).all()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (model.config.vocab_size, len(tokenizer)) == (320, NEW)
    assert model.generate(torch.tensor([[NEW - 1]]), max_new_tokens=3, do_sample=False).shape == (1, 4)


@pytest.mark.distributed
def test_a_resume_moves_on_bit_by_bit_and_refuses_other_rows(pools, inputs, tokenizer_path, extended, tmp_path):
    base = base_model(tmp_path / "base", tokenizer_path)

    def run(name: str, **method: Any) -> Any:
        return settings(inputs, base, extended, tmp_path / name, method=method, train={"steps": 6})

    pools(1)(train, run("whole"))
    pools(1)(train, run("cut"), stop_after=3)
    refused = pools(1)(refusal_of, run("cut", train_embeddings=NEW - 1))
    assert "method.train_embeddings: 300 in the checkpoint, 311 now" in refused[0]
    pools(1)(train, run("cut", train_embeddings=OLD))
    [folder] = (tmp_path / "whole" / "checkpoints").glob("step-*6")
    assert not different_tensors(folder, tmp_path / "cut" / "checkpoints" / folder.name)
    assert call(EXPORT, tmp_path / "cut", tmp_path / "peft", "--format=peft").code == 2


def test_the_rows_of_new_tokens(inputs, tokenizer_path, extended, tmp_path):
    from relora_mora.weights.vocabulary import add_rows

    base = base_model(tmp_path / "base", tokenizer_path)
    lm = AutoModelForCausalLM.from_pretrained(base)
    new, old = load_tokenizer(extended), load_tokenizer(tokenizer_path)
    rows = {}
    for kind in ("mean_of_pieces", "mean", "normal"):
        config = with_vocabulary(settings(inputs, base, extended, tmp_path, model={"new_tokens": kind}))
        assert (config.model.overrides, config.method.train_embeddings) == ({"vocab_size": 320}, OLD)
        weights = dict(lm.state_dict())
        add_rows(weights, lm, config)
        assert all(torch.equal(weights[name][:OLD], value) for name, value in ends(base).items())
        rows[kind] = weights["lm_head.weight"]
    weight, mean = lm.lm_head.weight, lm.lm_head.weight.mean(0)
    assert torch.equal(rows["mean"][OLD:], mean.expand(20, -1))
    assert all(torch.equal(rows[kind][NEW:], mean.expand(8, -1)) for kind in rows)
    for number in range(OLD, NEW):
        pieces = old.encode(new.decode([number]), add_special_tokens=False)
        assert len(pieces) > 1
        assert torch.equal(rows["mean_of_pieces"][number], weight[pieces].mean(0))
    drawn = (rows["normal"][OLD:NEW] - mean) / weight.std(0)
    assert drawn.std().item() == pytest.approx(1, abs=0.2)


@each(
    "sections, named",
    [
        (
            {"model": {"init_from": None, "config": "model.json"}, "method": {"train_embeddings": True}},
            "model.init_from",
        ),
        ({"model": {"new_tokens": None}}, "model.new_tokens"),
        ({"method": {"train_head": True}}, "method.train_head=false"),
    ],
)
def test_settings_that_do_not_fit_together(inputs, tokenizer_path, tmp_path, sections, named):
    with pytest.raises(ConfigError, match=named):
        settings(inputs, tmp_path, tokenizer_path, tmp_path, **sections)


@each(
    "tokenizer, sections, named",
    [
        ("other", {}, "have other ids"),
        ("old", {}, "method.train_embeddings"),
        ("extended", {"model": {"overrides": {"vocab_size": 310}}}, "model.overrides.vocab_size: 310"),
        ("extended", {"remove": True}, "model.new_tokens: mean_of_pieces"),
    ],
)
def test_what_start_and_tokenizer_do_not_allow(
    inputs, tokenizer_path, other_tokenizer, extended, tmp_path, tokenizer, sections, named
):
    base = base_model(tmp_path / "base", tokenizer_path)
    if sections.pop("remove", False):
        (base / "tokenizer.model").unlink()
    path = {"other": other_tokenizer, "old": tokenizer_path, "extended": extended}[tokenizer]
    with pytest.raises(ConfigError, match=named):
        with_vocabulary(settings(inputs, base, path, tmp_path, **sections))
