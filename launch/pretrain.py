"""Pretrains a model: ``deepspeed launch/pretrain.py CONFIG.yaml [--section.key=value ...]``, or with python or torchrun."""

from __future__ import annotations

import os
import sys

from relora_mora.cli import run
from relora_mora.config import load_config


def main(config: str, **overrides: str) -> int:
    """Pretrains a model.

    Args:
        config: a YAML file such as configs/run/tiny_remora.yaml
        overrides: settings as --section.key=value, e.g. --train.steps=100; docs/settings.md lists them
    """
    settings = load_config(config, overrides, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    from relora_mora.cycle import MergeError
    from relora_mora.trainer import TrainingError, pretrain  # takes seconds to import: settings are checked before

    try:
        pretrain(settings)
    except (MergeError, TrainingError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"the run ended: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run(main)
