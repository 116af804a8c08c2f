"""A cloud that is not there: prices, stock, boot times, spot losses and outages, by any clock.

The simulation runs it by a virtual clock. With `Machines` it boots real node processes on this machine, which
is how the scaler is tried against the real queue without a cloud.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from infra.scaler.driver import Health, Rented, StockOut

Clock = Callable[[], float]


@dataclass(frozen=True)
class Offer:
    """What one cloud sells. boot: seconds from order to a node that serves, median. loss_per_hour: spot
    hazard.
    """

    cloud: str
    price: float  # per hour
    stock: int  # machines at a time
    boot: float = 300.0
    loss_per_hour: float = 0.0


class Machines(Protocol):
    """What a simulated machine really runs."""

    def start(self, name: str) -> None:
        """The machine has booted."""
        ...

    def stop(self, name: str) -> None:
        """The machine is gone, at once."""
        ...


@dataclass
class _Rental:
    offer: Offer
    since: float
    up_at: float
    lost_at: float
    started: bool = False


class SimulatedCloud:
    """Sells from the cheapest offer in stock, as SkyPilot's optimizer would. Randomness from `rng` alone."""

    def __init__(
        self, offers: list[Offer], clock: Clock, rng: random.Random, machines: Machines | None = None
    ) -> None:
        self._offers = sorted(offers, key=lambda offer: (offer.price, offer.cloud))
        self._clock = clock
        self._rng = rng
        self._machines = machines
        self._rentals: dict[str, _Rental] = {}
        self._out: set[str] = set()  # clouds that are down
        self.spent = 0.0  # on machines that were given back or lost

    def machines(self) -> list[Rented]:
        """All rentals; lost ones until they are removed. Boots those whose time has come."""
        return [self._look(name, rental) for name, rental in self._rentals.items()]

    def add(self, name: str) -> None:
        """Rent from the cheapest offer that has one. Raises StockOut."""
        if name in self._rentals:
            return
        now = self._clock()
        for offer in self._offers:
            taken = sum(r.offer is offer and r.lost_at > now for r in self._rentals.values())
            if offer.cloud not in self._out and taken < offer.stock:
                boot = offer.boot * self._rng.uniform(0.7, 1.6)
                hazard = offer.loss_per_hour / 3600
                life = self._rng.expovariate(hazard) if hazard > 0 else float("inf")
                self._rentals[name] = _Rental(offer, now, now + boot, now + life)
                return
        raise StockOut("no cloud has such a machine")

    def remove(self, name: str) -> None:
        """End a rental; it is charged by the second until now, or until it was lost."""
        rental = self._rentals.pop(name, None)
        if rental is None:
            return
        self.spent += self._cost(rental)
        if self._machines is not None and rental.started:
            self._machines.stop(name)

    def lose(self, name: str) -> None:
        """The machine vanishes now, as a reclaimed spot machine does."""
        rental = self._rentals[name]
        rental.lost_at = min(rental.lost_at, self._clock())
        if self._machines is not None and rental.started:
            self._machines.stop(name)

    def fail(self, cloud: str) -> list[str]:
        """A whole cloud goes: its machines are lost, it sells nothing until `heal`. The machines' names."""
        self._out.add(cloud)
        now = self._clock()
        names = [n for n, r in self._rentals.items() if r.offer.cloud == cloud and r.lost_at > now]
        for name in names:
            self.lose(name)
        return names

    def heal(self, cloud: str) -> None:
        """It sells again."""
        self._out.discard(cloud)

    def times(self, name: str) -> tuple[float, float]:
        """When a machine is up, and when it is lost (infinity: never)."""
        return self._rentals[name].up_at, self._rentals[name].lost_at

    def cost(self) -> float:
        """Money spent until now, running rentals included."""
        return self.spent + sum(self._cost(rental) for rental in self._rentals.values())

    def _cost(self, rental: _Rental) -> float:
        return (min(self._clock(), rental.lost_at) - rental.since) / 3600 * rental.offer.price

    def _look(self, name: str, rental: _Rental) -> Rented:
        now = self._clock()
        up = now >= rental.up_at
        if rental.lost_at <= now:
            health = Health.LOST
        else:
            health = Health.UP if up else Health.PENDING
            if up and not rental.started:
                rental.started = True
                if self._machines is not None:
                    self._machines.start(name)
        return Rented(name, health, rental.since, rental.offer.price, rental.offer.cloud)
