"""What the scaler needs from a cloud: list, order and remove whole nodes by name.

The name is the node's id in the queue's registry as well (REEL_NODE_ID), which is how a machine and its node
are known to be the same thing. All three calls must bear repetition: the scaler may die between any two
lines.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class DriverError(Exception):
    """The cloud's tool failed or answered nonsense. Nothing is known to have changed; the next pass tries
    again.
    """


class StockOut(DriverError):
    """Nobody has such a machine to sell now: back off."""


class Health(StrEnum):
    """What the cloud says of a machine."""

    PENDING = "pending"  # ordered, not up
    UP = "up"
    LOST = "lost"  # taken away, stopped or failed; what is left of it can be removed


@dataclass(frozen=True)
class Rented:
    """One machine as its cloud knows it. since: Unix seconds, 0 if unknown. price: per hour, 0 if unknown."""

    name: str
    health: Health
    since: float = 0.0
    price: float = 0.0
    where: str = ""  # cloud and region, for people


class Driver(Protocol):
    """One pool of like machines in some cloud."""

    def machines(self) -> list[Rented]:
        """Every machine of the pool, those that are on their way included. Raises DriverError."""
        ...

    def add(self, name: str) -> None:
        """Order one machine; returns before it is up. Does nothing if the name exists. Raises StockOut,
        DriverError.
        """
        ...

    def remove(self, name: str) -> None:
        """Give one machine back. Does nothing if there is none of that name. Raises DriverError."""
        ...
