"""What the tests of memory share."""

from typing import Any

from relora_mora.config.load import validate
from relora_mora.config.schema import Config


def make_config(method: dict[str, Any], model: dict[str, Any] | None = None, micro_batch_size: int = 4) -> Config:
    tree = {
        "model": {"config": "x", **(model or {})},
        "tokenizer": {"path": "x"},
        "data": {"train": "x", "validation": "x", "sequence_length": 64},
        "method": {"rank": 16, **method},
        "train": {"run_dir": "x", "batch_size": micro_batch_size, "micro_batch_size": micro_batch_size},
    }
    return validate(tree, "the test")
