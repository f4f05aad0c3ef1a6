"""Seeds for everything random."""

import hashlib


def derived_seed(*parts: object) -> int:
    """63 bits that depend only on ``parts``: the same on every rank, world size, machine and resume."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
