"""Fixtures of the tests of weights."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from relora_mora.tokenizer.identity import save_tokenizer
from relora_mora.tokenizer.load import load_tokenizer
from tests.tools.adapter_tools import save_base
from tests.tools.checkpoints import write_checkpoint
from tests.tools.runs import LLAMA, checkpoint_at


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def hf_tokenizer(tokenizer_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder without tokenizer.model; end 300, padding 301."""
    folder = tmp_path_factory.mktemp("hf_tokenizer")
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "pad_token": "<|pad|>"})
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


@pytest.fixture
def run(model: LlamaForCausalLM, hf_tokenizer: Path, tmp_path: Path) -> Path:
    """A run folder with one checkpoint."""
    save_tokenizer(hf_tokenizer, tmp_path / "run" / "tokenizer")
    write_checkpoint(checkpoint_at(tmp_path / "run", 5), model, hf_tokenizer)
    return tmp_path / "run"
