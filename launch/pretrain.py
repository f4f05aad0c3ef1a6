"""Pretrains a model: ``deepspeed launch/pretrain.py CONFIG.yaml [--section.key=value ...]``; also python, torchrun."""

from __future__ import annotations

import sys

try:
    from relora_mora.cli import run
    from relora_mora.config import Config, load_config
    from relora_mora.supervise import FAILED, LOST, Guard, check_environment, leave_process
    from relora_mora.system.imports import many_imports
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None


def main(config: str, *, show: int | None = None, **overrides: str) -> int:
    """Pretrains a model.

    Exit codes: 0 done, 1 training cannot go on, 2 a mistake in settings or data, 69 another rank or the launcher is
    gone, 75 stopped by a signal with everything saved. After 69 and 75 the same command continues. docs/reliability.md.

    Args:
        config: a YAML file such as configs/run/tiny_remora.yaml
        show: prints so many rows of the training data as tokens, with the scored part marked, and trains nothing
        overrides: settings as --section.key=value, e.g. --train.steps=100; docs/settings.md lists them
    """
    if show is not None:
        return _show(load_config(config, overrides), show)
    rank, world_size = check_environment()
    guard = Guard(rank)  # before anything that takes time
    settings = load_config(config, overrides, world_size=world_size)
    with many_imports():  # takes seconds: settings are checked before
        from relora_mora.distributed.join import JoinError
        from relora_mora.merging import MergeError
        from relora_mora.train import TrainingError, pretrain

    try:
        return pretrain(settings, guard)
    except (MergeError, TrainingError) as error:
        if rank == 0:
            print(f"the run ended: {error}", file=sys.stderr)
        return FAILED
    except JoinError as error:
        print(f"the run ended: {error}", file=sys.stderr)
        return LOST


def _show(config: Config, count: int) -> int:
    if count < 1:
        raise ValueError(f"--show: got {count}, expected at least 1")
    from relora_mora.data import show_records

    show_records(config, count)
    return 0


if __name__ == "__main__":
    try:
        run(main)
    except SystemExit as end:
        leave_process(end.code if isinstance(end.code, int) else FAILED)  # run() always gives a number
