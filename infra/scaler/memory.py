"""Where the scaler keeps what it must remember, and how only one of them acts at a time.

Redis keys: ``reel:scaler:memory:<model>`` (string, JSON, rewritten at every pass, one a pool) and
``reel:scaler:leader`` (string with a time limit, one).
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, Protocol
from uuid import uuid4

from infra.scaler.policy import Memory
from jobs.client import RedisClient, guard
from jobs.errors import StoreUnavailable
from jobs.scripts import PREFIX

LEADER = f"{PREFIX}scaler:leader"


class LeadLost(Exception):
    """Another scaler leads, or may: what this one has seen and decided is void. Nothing was written."""


class MemoryStore(Protocol):
    """Keeps one Memory a model."""

    def load(self, model: str) -> Memory:
        """The last one saved, or an empty one."""
        ...

    def save(self, model: str, memory: Memory) -> None:
        """Keep it. Raises LeadLost when somebody else may have written meanwhile; the pass ends then."""
        ...


class RedisMemory:
    """In Redis, beside the queue: what one scaler wrote, its successor reads. Only the leader writes."""

    def __init__(self, client: RedisClient, lead: "Leadership") -> None:
        self._redis = client
        self._lead = lead

    def load(self, model: str) -> Memory:
        """Raises StoreUnavailable, and ValueError for a text that is not ours."""
        with guard():
            text: Any = self._redis.execute_command("GET", _key(model))
        return Memory() if text is None else from_json(text)

    def save(self, model: str, memory: Memory) -> None:
        """Raises StoreUnavailable, and LeadLost, which is told in the same step as the write."""
        if not self._lead.write(_key(model), to_json(memory)):
            raise LeadLost(f"the lead was lost during the pass for {model}: its plan is dropped")


def to_json(memory: Memory) -> str:
    """One line of JSON."""
    return json.dumps(asdict(memory), separators=(",", ":"))


def from_json(text: str) -> Memory:
    """Raises ValueError naming what is wrong. Unknown fields (a newer scaler's) are dropped."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        data = None
    if not isinstance(data, dict):
        raise ValueError(
            f"scaler memory: got {text[:80]!r}, expected a JSON object; delete the key to start anew"
        )
    known = {name: _frozen(value) for name, value in data.items() if name in Memory.__dataclass_fields__}
    return Memory(**known)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _key(model: str) -> str:
    return f"{PREFIX}scaler:memory:{model}"


_HOLD = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_OURS = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end "
_RENEW = _OURS + "return redis.call('PEXPIRE', KEYS[1], ARGV[2])"
_WRITE = _OURS + "redis.call('SET', KEYS[2], ARGV[2]) return 1"
_LEAVE = _OURS + "return redis.call('DEL', KEYS[1])"


class Leadership:
    """A lock with a time limit: the holder acts, others stand by. A dead one is followed after `seconds`."""

    def __init__(self, client: RedisClient, seconds: float) -> None:
        self._redis = client
        self._token = uuid4().hex
        self._limit = int(seconds * 1000)

    def hold(self) -> bool:
        """Take or renew the lead; False while somebody else has it. Raises StoreUnavailable."""
        return self._run(_HOLD, (LEADER,), self._limit)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renew the lead from a thread while the block runs, however slow the clouds' tools are.

        A lead that ended all the same is not taken again: another scaler may have acted since.
        """
        done = threading.Event()
        thread = threading.Thread(target=self._renew, args=(done,), name="lead", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def write(self, key: str, text: str) -> bool:
        """Set `key` while the lead is ours, in one step; False if it is not. Raises StoreUnavailable."""
        return self._run(_WRITE, (LEADER, key), text)

    def leave(self) -> None:
        """Let a successor start at once. Raises StoreUnavailable."""
        self._run(_LEAVE, (LEADER,))

    def _renew(self, done: threading.Event) -> None:
        while not done.wait(self._limit / 4000):  # four times in its life
            with suppress(StoreUnavailable):  # again at the next turn, unless it ends before
                if not self._run(_RENEW, (LEADER,), self._limit):
                    return

    def _run(self, script: str, keys: tuple[str, ...], *args: str | int) -> bool:
        with guard():
            return bool(self._redis.execute_command("EVAL", script, len(keys), *keys, self._token, *args))
