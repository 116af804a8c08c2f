"""A node's wish to end: since when, and how long what runs may go on."""

import threading
import time


class Drain:
    """Shared by the claim loop, the publisher and the node's beat."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._deadline = float("inf")

    def ask(self, grace: float) -> None:
        """Take nothing new from now on, and give back what runs after `grace` seconds; may be shortened."""
        self._deadline = min(self._deadline, time.monotonic() + grace)
        self._asked.set()

    @property
    def asked(self) -> bool:
        """Whether nothing new may be claimed."""
        return self._asked.is_set()

    @property
    def overdue(self) -> float:
        """Seconds past the end of the grace; negative before it."""
        return time.monotonic() - self._deadline if self.asked else float("-inf")
