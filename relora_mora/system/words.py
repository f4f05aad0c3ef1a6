"""Numbers in messages."""


def counted(number: int, noun: str) -> str:
    """``1 merge``, ``0 merges``, ``1,200 merges``: a noun whose plural ends with an s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
