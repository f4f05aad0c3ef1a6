"""How a run can end without having been asked to."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run that cannot go on; the reason is for the user, and the same on all ranks."""

    same_on_all_ranks = True


class DataError(ValueError):
    """The data of some rank cannot be read; what was trained before is saved."""

    same_on_all_ranks = True


class MemoryShortage(ValueError):
    """Settings that ask for more memory than there is."""
