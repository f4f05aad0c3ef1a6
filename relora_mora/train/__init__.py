"""A run from its settings to its end."""

from relora_mora.train.errors import TrainingError
from relora_mora.train.loop import Trainer
from relora_mora.train.pretrain import pretrain

__all__ = ["Trainer", "TrainingError", "pretrain"]
