"""``relora-mora sample``: the continuation of a text on stdout."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from relora_mora.tokenizer.identity import save_tokenizer
from relora_mora.tokenizer.load import load_tokenizer
from tests.tools.commands import call, refused
from tests.tools.runs import LLAMA


@pytest.fixture(scope="module")
def model(tokenizer_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA | {"max_position_embeddings": 40}, initializer_range=0.4)).save_pretrained(
        folder
    )
    save_tokenizer(tokenizer_path, folder)
    return folder


def sampled(*argv: object) -> str:
    answer = call("sample", *argv)
    assert answer.code == 0, answer.err
    return answer.out


def test_the_most_probable_tokens_are_those_of_transformers(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    prompt = tokenizer("the rank", return_tensors="pt")
    lm = LlamaForCausalLM.from_pretrained(model)
    tokens = lm.generate(**prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)[0]
    expected = tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    argv = ["--temperature=0", "--max_new_tokens=9"]
    assert sampled(model, "the rank", *argv) == expected
    assert sampled(model, "the rank", "--top_p=0.00001", "--max_new_tokens=9") == expected


def test_a_seed_gives_one_text_that_ends_with_the_positions_of_the_model(model: Path) -> None:
    first, again, other = (sampled(model, "the rank", f"--seed={seed}", "--temperature=2") for seed in (1, 1, 2))
    assert first == again != other
    assert first.startswith("the rank")
    assert sampled(model, "the rank", "--seed=1", "--temperature=2", "--max_new_tokens=1000") == first


def test_what_cannot_be_continued_is_refused(model: Path, tmp_path: Path) -> None:
    refused(call("sample", model, "the rank " * 40), "TEXT: got", "expected 1 to 39")
    refused(call("sample", tmp_path, "the"), "not a checkpoint")
    for option in ("--temperature=-1", "--top_p=0", "--top_p=2"):
        refused(call("sample", model, "the", option), option.replace("=", ": got "))
    without = shutil.copytree(model, tmp_path / "without")
    for file in without.glob("tokenizer*"):
        file.unlink()
    refused(call("sample", without, "the"), "this folder has no tokenizer")
