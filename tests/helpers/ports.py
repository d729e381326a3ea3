"""A free port for processes that communicate."""

import random
import socket

# Below the ephemeral ports, which any process may get at any time.
RANGE = range(20_000, 32_000)


def free_port() -> str:
    """Return a port that no process listens on."""
    # Not from the tests' seed: two processes would try the same ports in the same order.
    draw = random.SystemRandom()
    while True:
        port = draw.choice(RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return str(port)
