"""Whether attention may keep a row's first maximum, and the way back when that went wrong.

Such a kernel ("settled", see `kernels.attention.flash4_softmax`) turns a row to NaN where a score is out of
all proportion to those before it. Nobody waits for the GPU to look: whoever meets a result that isn't finite
asks `give_up`, and computes it again if that says so.
"""

from dataclasses import dataclass


@dataclass
class Settled:
    """The process' state: one kernel serves all of its attention."""

    allowed: bool = True
    used: bool = False

    def ask(self) -> bool:
        """Whether a kernel may do it; remembers that one did."""
        self.used = self.used or self.allowed
        return self.allowed

    def give_up(self) -> bool:
        """Do without from now on. Whether that can change a result: False where no kernel ever did it."""
        changes = self.allowed and self.used
        self.allowed = self.allowed and not changes
        return changes

    def trust(self) -> None:
        """Allow it again: what wasn't finite was not its fault."""
        self.allowed = True


settled = Settled()
