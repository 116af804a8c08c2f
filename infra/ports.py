"""Ports for a local stack: a block of 16 that no other local stack can take at the same time.

Two stacks that look for free ports together could pick the same one, because a port that was free when
asked is not reserved. So each stack binds the first port of its block and keeps it bound while it lives;
the others are handed to its services. Blocks lie below the kernel's ephemeral range (from 32768), where
no outgoing connection can sit on them.
"""

import contextlib
import random
import socket

from infra.errors import CliError

BLOCK = 16
LOW, HIGH = 20_000, 32_000
HOST = "127.0.0.1"


def is_free(port: int, host: str = HOST) -> bool:
    """Whether a server could listen on this TCP port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


class PortBlock:
    """Sixteen neighbouring ports; `ports` are the fifteen to use, `base` is the one that guards them."""

    def __init__(self, base: int, guard: socket.socket) -> None:
        self.base = base
        self.ports = list(range(base + 1, base + BLOCK))
        self._guard = guard

    @classmethod
    def claim(cls, preferred: int | None = None) -> "PortBlock":
        """Claim the preferred block when it is free (the same stack keeps its URLs), else a random one.

        Raises CliError when no block is free.
        """
        bases = list(range(LOW, HIGH, BLOCK))
        random.SystemRandom().shuffle(bases)
        if preferred is not None:
            bases.insert(0, preferred)
        for base in bases:
            guard = _bind(base)
            if guard is None:
                continue
            if all(is_free(port) for port in range(base + 1, base + BLOCK)):
                return cls(base, guard)
            guard.close()
        raise CliError(f"no {BLOCK} neighbouring free ports between {LOW} and {HIGH} on {HOST}")

    def release(self) -> None:
        """Let another stack have the block."""
        with contextlib.suppress(OSError):
            self._guard.close()


def _bind(port: int) -> socket.socket | None:
    guard = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        guard.bind((HOST, port))
        guard.listen(1)  # without it a second bind with SO_REUSEADDR would succeed
    except OSError:
        guard.close()
        return None
    return guard
