"""Whole training steps of several methods side by side, in one process group: time, memory, bytes on the network."""

from relora_mora.benchmark.contenders import CONTENDERS, Setting
from relora_mora.benchmark.measure import Result, run

__all__ = ["CONTENDERS", "Result", "Setting", "run"]
