"""Fine-tunes a model: like pretraining, with other defaults."""

from relora_mora.cli.arguments import PositiveInt
from relora_mora.commands.pretrain import train


def main(config: str, *, show: PositiveInt | None = None, **overrides: str) -> int:
    """Fine-tunes the model that model.init_from names.

    It is like relora-mora pretrain, with the same exit codes but other defaults (docs/finetuning.md).

    Arguments:
        config: a YAML file, or the name of a shipped one (relora-mora configs)
        overrides: settings, e.g. --model.init_from=FOLDER; docs/settings.md lists them

    Options:
        show: print this many rows of the training data as tokens, with the scored part marked, and train nothing

    Example:
        relora-mora finetune instruction --model.init_from=models/llama --data.train=chats.jsonl
    """
    from relora_mora.config.load import FINETUNING

    return train(config, overrides, FINETUNING, show=show)
