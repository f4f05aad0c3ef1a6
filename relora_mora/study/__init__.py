"""Grids of runs: what is run, the runs in turn, and what is kept of them."""

from relora_mora.study.conduct import CellsFailed, conduct, run_again
from relora_mora.study.design import Study, read_study
from relora_mora.study.folder import StudyFolder
from relora_mora.study.runner import Stopped

__all__ = ["CellsFailed", "Stopped", "Study", "StudyFolder", "conduct", "read_study", "run_again"]
