"""Pretrains a model: ``deepspeed launch/pretrain.py CONFIG.yaml [--section.key=value ...]``; also python, torchrun."""

from __future__ import annotations

try:
    from relora_mora.cli.arguments import PositiveInt
    from relora_mora.train.command import run_to_the_end, train
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None


def main(config: str, *, show: PositiveInt | None = None, **overrides: str) -> int:
    """Pretrains a model.

    Exit codes (docs/reliability.md): 0 done, 1 training cannot continue, 2 a mistake in settings or data, 69 another
    rank or the launcher is gone, 75 stopped by a signal with everything saved. After 69 and 75, start it again.

    Args:
        config: a YAML file such as configs/run/tiny_remora.yaml
        show: print this many rows of the training data as tokens, with the scored part marked, and train nothing
        overrides: settings as --section.key=value, e.g. --train.steps=100; docs/settings.md lists them
    """
    return train(config, overrides, show=show)


if __name__ == "__main__":
    run_to_the_end(main)
