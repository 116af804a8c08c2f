"""Where the scaler keeps what it must remember, and how only one of them acts at a time.

Redis keys: ``reel:scaler:memory:<model>`` (string, JSON, rewritten at every pass, one a pool) and
``reel:scaler:leader`` (string with a time limit, one).
"""

import json
from dataclasses import asdict
from typing import Any, Protocol
from uuid import uuid4

from infra.scaler.policy import Memory
from jobs.client import RedisClient, guard
from jobs.scripts import PREFIX


class MemoryStore(Protocol):
    """Keeps one Memory a model."""

    def load(self, model: str) -> Memory:
        """The last one saved, or an empty one."""
        ...

    def save(self, model: str, memory: Memory) -> None:
        """Keep it."""
        ...


class RedisMemory:
    """In Redis, beside the queue: what one scaler wrote, its successor reads."""

    def __init__(self, client: RedisClient) -> None:
        self._redis = client

    def load(self, model: str) -> Memory:
        """Raises StoreUnavailable, and ValueError for a text that is not ours."""
        with guard():
            text: Any = self._redis.execute_command("GET", _key(model))
        return Memory() if text is None else from_json(text)

    def save(self, model: str, memory: Memory) -> None:
        """Raises StoreUnavailable."""
        with guard():
            self._redis.execute_command("SET", _key(model), to_json(memory))


def to_json(memory: Memory) -> str:
    """One line of JSON."""
    return json.dumps(asdict(memory), separators=(",", ":"))


def from_json(text: str) -> Memory:
    """Raises ValueError naming what is wrong. Unknown fields (a newer scaler's) are dropped."""
    data = json.loads(text)
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
_LEAVE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class Leadership:
    """A lock with a time limit: the holder acts, others stand by. A dead one is followed after `seconds`."""

    def __init__(self, client: RedisClient, seconds: float) -> None:
        self._redis = client
        self._token = uuid4().hex
        self._limit = int(seconds * 1000)

    def hold(self) -> bool:
        """Take or renew the lead; False while somebody else has it. Raises StoreUnavailable."""
        return self._run(_HOLD, self._token, self._limit)

    def leave(self) -> None:
        """Let a successor start at once. Raises StoreUnavailable."""
        self._run(_LEAVE, self._token)

    def _run(self, script: str, *args: str | int) -> bool:
        with guard():
            return bool(self._redis.execute_command("EVAL", script, 1, f"{PREFIX}scaler:leader", *args))
