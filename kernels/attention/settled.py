"""Whether attention may keep a row's first maximum, and the way back when that went wrong.

Such a kernel ("settled", see `kernels.attention.flash4_softmax`) turns a row to NaN where a score is out of
all proportion to those before it. Nobody waits for the GPU to look: whoever meets a result that isn't finite
and finds it `suspect` forbids it and computes the result again.
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

    def begin(self) -> None:
        """Of a result: what kernels did before it, such as for a probe, is not its concern."""
        self.used = False

    @property
    def suspect(self) -> bool:
        """Whether the result can come out otherwise without: a kernel did it since `begin`."""
        return self.allowed and self.used

    def forbid(self) -> None:
        """Do without from now on."""
        self.allowed = False

    def trust(self) -> None:
        """Allow it again: what wasn't finite was not its fault."""
        self.allowed = True


settled = Settled()
