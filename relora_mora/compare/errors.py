"""What cannot be compared."""


class CompareError(ValueError):
    """Folders that hold no runs, or runs with nothing in common; the message says what to give instead."""
