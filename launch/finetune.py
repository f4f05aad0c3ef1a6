"""Fine-tunes a model: ``deepspeed launch/finetune.py CONFIG.yaml [--section.key=value ...]``; also python, torchrun."""

from __future__ import annotations

try:
    from relora_mora.cli.arguments import PositiveInt
    from relora_mora.train.command import run_to_the_end, train
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None


def main(config: str, *, show: PositiveInt | None = None, **overrides: str) -> int:
    """Fine-tunes the model that model.init_from names.

    Like launch/pretrain.py, with the same exit codes but other defaults: see docs/finetuning.md.

    Args:
        config: a YAML file; docs/finetuning.md shows one
        show: print this many rows of the training data as tokens, with the scored part marked, and train nothing
        overrides: settings as --section.key=value, e.g. --model.init_from=FOLDER; docs/settings.md lists them
    """
    from relora_mora.config.load import FINETUNING

    return train(config, overrides, FINETUNING, show=show)


if __name__ == "__main__":
    run_to_the_end(main)
