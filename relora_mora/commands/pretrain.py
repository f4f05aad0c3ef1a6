"""Pretrains a model. It is also what the commands that train share, from their settings to their exit code."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from relora_mora.cli.arguments import PositiveInt
from relora_mora.cli.command import run
from relora_mora.system.process import many_imports, own_command, say

if TYPE_CHECKING:
    from relora_mora.config.schema import Config


def main(config: str, *, show: PositiveInt | None = None, **overrides: str) -> int:
    """Pretrains a model.

    Start it on several GPUs with deepspeed --module relora_mora pretrain ..., with torchrun, or in a Slurm job.

    Exit codes: 0 done, 1 training cannot continue, 2 a mistake in settings or data, 69 another rank or the launcher is
    gone, 75 stopped by a signal with everything saved. After 69 and 75, start it again.

    Arguments:
        config: a YAML file, or the name of a shipped one (relora-mora configs)
        overrides: settings, e.g. --train.steps=100; docs/settings.md lists them

    Options:
        show: print this many rows of the training data as tokens, with the scored part marked, and train nothing

    Example:
        relora-mora pretrain tiny_remora --train.steps=100
    """
    return train(config, overrides, show=show)


def train(
    config: str,
    overrides: Mapping[str, str],
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    show: int | None = None,
) -> int:
    """Trains the run of a settings file to its end and returns the exit code (docs/trouble.md).

    ``overrides`` and ``defaults`` are passed to :func:`load_config`. With ``show``, it prints that many rows of the
    training data instead.
    """
    from relora_mora.config.load import ConfigError, load_config
    from relora_mora.supervise.exits import FAILED, LOST
    from relora_mora.supervise.guard import Guard
    from relora_mora.supervise.launchers import check_environment
    from relora_mora.train.begin.files import check_files

    if show is not None:
        return _show(load_config(config, overrides, defaults=defaults), show)
    rank, world_size = check_environment()
    guard = Guard(rank)  # before anything that takes time
    settings = load_config(config, overrides, world_size=world_size, defaults=defaults)
    if defaults is not None and settings.model.init_from is None:
        fault = "model.init_from: missing; name the folder of the model to fine-tune, or use relora-mora pretrain"
        raise ConfigError([fault], config)
    if world_size == 1:  # several ranks do it after they have joined, so that all of them end
        check_files(settings)
    with many_imports():  # takes seconds, so all of the above is checked first
        from relora_mora.distributed.join import JoinError
        from relora_mora.engine.merging import MergeError
        from relora_mora.train.pretrain import pretrain
        from relora_mora.train.state.run_state import TrainingError

    try:
        code = pretrain(settings, guard)
    except (MergeError, TrainingError) as error:
        if rank == 0:
            say(f"the run ended: {error}")
        return FAILED
    except JoinError as error:
        say(f"the run ended: {error}")
        return LOST
    if code == 0 and rank == 0:
        say(_next_commands(settings.train.run_dir))
    return code


def _next_commands(run_dir: str) -> str:
    """The commands for a finished run, one per line."""
    program = own_command()
    run = shlex.quote(run_dir)
    folder = Path(run_dir)
    export = shlex.quote(str(folder.with_name(f"{folder.name}_export")))
    return "\n".join(
        [
            "next:",
            f"  {program} evaluate {run}",
            f"  {program} sample {run} 'The'",
            f"  {program} export {run} {export}",
            f"  {program} board {shlex.quote(str(folder.parent))}    # TensorBoard",
        ]
    )


def _show(config: "Config", count: int) -> int:
    from relora_mora.train.begin.files import check_files

    check_files(config)
    with many_imports():
        from relora_mora.data.first_rows import show_records
        from relora_mora.tokenizer.identity import check_vocabulary
        from relora_mora.train.begin.inputs import open_text
        from relora_mora.train.begin.settings import check_model
        from relora_mora.weights.vocabulary import with_vocabulary

    config = with_vocabulary(config)
    model = check_model(config)
    tokenizer = open_text(config).tokenizer
    check_vocabulary(tokenizer, model.vocab_size, trained=config.model.init_from is not None)
    show_records(config, count)
    return 0


def run_to_the_end(main: Callable[..., int], argv: Sequence[str] | None = None, *, name: str | None = None) -> NoReturn:
    """Runs ``main`` like :func:`run`. It does not wait for the end of libraries."""
    from relora_mora.supervise.exits import FAILED, leave_now

    try:
        run(main, argv, name=name)
    except SystemExit as end:
        leave_now(end.code if isinstance(end.code, int) else FAILED)  # commands exit with numbers
