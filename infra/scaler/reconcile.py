"""One pass over one pool: look, decide, write down, act.

The order matters for a scaler that may die anywhere: a machine's name is written down before it is ordered,
and a drain before it is asked for, so the next scaler finds every half-done thing and finishes it.
"""

import re
import secrets
from dataclasses import dataclass, replace

from infra.scaler.driver import Driver, DriverError
from infra.scaler.memory import MemoryStore
from infra.scaler.observe import Source, look
from infra.scaler.policy import Decision, Memory, Policy, Seen, decide, order_failed


@dataclass(frozen=True)
class Pass:
    """What one pass saw, decided and did. done: reasons and actions, in order, for people."""

    model: str
    seen: Seen
    decision: Decision
    done: tuple[str, ...]


class Pool:
    """One model's nodes in one cloud."""

    def __init__(
        self, model: str, policy: Policy, driver: Driver, source: Source, memory: MemoryStore
    ) -> None:
        self.model = model
        self.policy = policy
        self._driver = driver
        self._source = source
        self._memory = memory

    def step(self, *, dry_run: bool = False) -> Pass:
        """One pass. Raises StoreUnavailable or DriverError when the pool can't be seen, ValueError when its
        memory can't be read, and LeadLost when another scaler may lead: before anything is done by the plan,
        or after an order that failed.

        dry_run: nothing is written, asked or ordered.
        """
        memory = self._memory.load(self.model)
        seen = look(
            self._source.now(),
            self._source.load(self.model),
            self._source.nodes(self.model),
            self._driver.machines(),
            memory,
            self.policy.price_per_hour,
        )
        decision = decide(self.policy, seen, memory)
        if dry_run:
            plans = [f"would order {decision.add}"] if decision.add else []
            plans += [f"would drain {name}" for name in decision.drain]
            plans += [f"would remove {name}" for name in decision.remove]
            return Pass(self.model, seen, decision, (*decision.reasons, *plans))
        return Pass(self.model, seen, decision, (*decision.reasons, *self._act(decision, seen.now)))

    def _act(self, decision: Decision, now: float) -> list[str]:
        names = [machine_name(self.model) for _ in range(decision.add)]
        drains = {**dict(decision.memory.drains), **dict.fromkeys(decision.drain, now)}
        orders = {**dict(decision.memory.orders), **dict.fromkeys(names, now)}
        memory = replace(decision.memory, orders=tuple(orders.items()), drains=tuple(drains.items()))
        self._memory.save(self.model, memory)
        done = [self._remove(name) for name in decision.remove]
        for name in drains:  # again at every pass: a node that was only starting may report by now
            self._source.drain(name)
            if name in decision.drain:
                done.append(f"asked {name} to drain")
        return done + self._order(names, memory, now)

    def _order(self, names: list[str], memory: Memory, now: float) -> list[str]:
        done: list[str] = []
        for place, name in enumerate(names):
            try:
                self._driver.add(name)
                done.append(f"ordered {name}")
            except DriverError as error:
                left = set(names[place:])
                kept = tuple((n, at) for n, at in memory.orders if n not in left)
                memory, text = order_failed(self.policy, replace(memory, orders=kept), now, str(error))
                self._memory.save(self.model, memory)
                done.append(text)
                break
        return done

    def _remove(self, name: str) -> str:
        try:
            self._driver.remove(name)
            return f"removed {name}"
        except DriverError as error:
            return f"could not remove {name} ({error}): again at the next pass"


def machine_name(model: str) -> str:
    """A new name that DNS, Kubernetes and every cloud accept: ``reel-<model>-<8 hex digits>``, at most 40
    long.
    """
    return f"reel-{slug(model)}-{secrets.token_hex(4)}"


def slug(model: str) -> str:
    """A model's name in the letters, digits and dashes that such names may have."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:24].strip("-") or "model"
