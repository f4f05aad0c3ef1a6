"""Two tiny runs with the examples of CONTRIBUTING's recipes: ``python -m tests.tools.recipe_runs FOLDER TOKENIZER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.tools.data_tools import some_texts
from tests.tools.runs import LLAMA, run_config, train, write_inputs


def main(folder: Path, tokenizer: str) -> None:
    inputs = write_inputs(folder / "inputs")
    logs = {name: inputs / f"{name}.log" for name in ("train", "validation")}
    for seed, path in enumerate(logs.values()):
        path.write_text("\n".join(some_texts(60, seed=seed)), encoding="utf-8")
    train(
        run_config(
            inputs,
            tokenizer,
            folder / "remora",
            data={name: str(path) for name, path in logs.items()},
            method={"operators": [99, 1]},
            optim={"schedule": "inverse_sqrt"},
            log={"every_steps": 5, "first_steps": 2, "csv": True},
        )
    )
    (inputs / "model.json").write_text(
        json.dumps(LLAMA | {"model_type": "helium", "num_key_value_heads": 2, "head_dim": 12})
    )
    config = run_config(
        inputs, tokenizer, folder / "rslora", method={"name": "rslora"}, optim={"matrices": "muon", "lr": 1e-3}
    )
    train(config, stop_after=5)
    train(config)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
