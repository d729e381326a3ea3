"""A port for processes that talk to each other; other tests and programs have theirs."""

import random
import socket

# Below those that systems hand out by themselves, which somebody could be given at any moment.
RANGE = range(20_000, 32_000)


def free_port() -> str:
    """Return a port that nothing listens on."""
    # Not from the seed that tests set: two processes would try the same ones in the same order.
    draw = random.SystemRandom()
    while True:
        port = draw.choice(RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return str(port)
