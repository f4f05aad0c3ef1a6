"""Ports for tests, which bind them later."""

import contextlib
import random
import socket


def free_port() -> int:
    """A port outside the range that Linux assigns automatically, so that it is free when it is bound."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
