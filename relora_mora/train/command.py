"""Code that the training commands share, from their settings to their exit code.

Slow imports happen inside functions, so that Ctrl-C works during them.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from relora_mora.cli.command import run
from relora_mora.system.process import many_imports, say

if TYPE_CHECKING:
    from relora_mora.config.schema import Config


def train(
    config: str,
    overrides: Mapping[str, str],
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    show: int | None = None,
) -> int:
    """Trains the run of a settings file to its end and returns the exit code (docs/reliability.md).

    ``overrides`` and ``defaults`` are passed to :func:`load_config`. With ``show``, it prints that many rows of the
    training data instead.
    """
    from relora_mora.config.load import load_config
    from relora_mora.supervise.exits import FAILED, LOST
    from relora_mora.supervise.guard import Guard
    from relora_mora.supervise.launchers import check_environment

    if show is not None:
        return _show(load_config(config, overrides, defaults=defaults), show)
    rank, world_size = check_environment()
    guard = Guard(rank)  # before anything that takes time
    settings = load_config(config, overrides, world_size=world_size, defaults=defaults)
    with many_imports():  # takes seconds, so settings are checked first
        from relora_mora.distributed.join import JoinError
        from relora_mora.engine.merging import MergeError
        from relora_mora.train.pretrain import pretrain
        from relora_mora.train.state.run_state import TrainingError

    try:
        return pretrain(settings, guard)
    except (MergeError, TrainingError) as error:
        if rank == 0:
            say(f"the run ended: {error}")
        return FAILED
    except JoinError as error:
        say(f"the run ended: {error}")
        return LOST


def _show(config: "Config", count: int) -> int:
    with many_imports():
        from relora_mora.data.sets.show import show_records
        from relora_mora.tokenizer.identity import check_vocabulary
        from relora_mora.train.begin.check import check_model
        from relora_mora.train.begin.inputs import open_inputs
        from relora_mora.weights.load import with_tokenizer

    model = check_model(config)
    config = with_tokenizer(config)
    tokenizer = open_inputs(config).tokenizer
    check_vocabulary(tokenizer, model.vocab_size, trained=config.model.init_from is not None)
    show_records(config, count)
    return 0


def run_to_the_end(main: Callable[..., int]) -> None:
    """Runs ``main`` with the arguments of the command line. The process exits here."""
    try:
        run(main)
    except SystemExit as end:
        try:
            from relora_mora.supervise.exits import FAILED, leave_process
        except ModuleNotFoundError:  # run() has reported it
            raise end from None
        leave_process(end.code if isinstance(end.code, int) else FAILED)  # run() always exits with a number
