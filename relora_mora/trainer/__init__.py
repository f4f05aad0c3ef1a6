"""A run from its settings to its end."""

from relora_mora.trainer.errors import DataError, TrainingError
from relora_mora.trainer.pretrain import pretrain
from relora_mora.trainer.trainer import Trainer

__all__ = ["DataError", "Trainer", "TrainingError", "pretrain"]
