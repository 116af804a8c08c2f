"""Per-key rate limit: a token bucket in Redis, so that all API processes share it."""

import math
from dataclasses import dataclass

from jobs.client import RedisClient, guard
from jobs.scripts import PREFIX
from jobs.settings import Settings

# KEYS[1] bucket; ARGV capacity, tokens per second. Returns {allowed, tokens left, milliseconds to the next}.
# Redis TIME, so that API hosts with wrong clocks agree. The key expires once the bucket would be full again.
BUCKET = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local capacity, rate = tonumber(ARGV[1]), tonumber(ARGV[2])
local bucket = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens = tonumber(bucket[1]) or capacity
tokens = math.min(capacity, tokens + math.max(0, now - (tonumber(bucket[2]) or now)) * rate)
local allowed = 0
if tokens >= 1 then
  allowed = 1
  tokens = tokens - 1
end
redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil((capacity - tokens) / rate * 1000) + 1000)
return {allowed, math.floor(tokens), math.ceil(math.max(0, 1 - tokens) / rate * 1000)}
"""


@dataclass(frozen=True)
class RateDecision:
    """Whether the request may go on, and what is left of the quota."""

    allowed: bool
    limit: int  # requests a window
    window: int  # seconds
    remaining: int  # requests that could be sent at once now
    retry_after: int  # seconds until one more request fits; 0 when allowed

    @property
    def headers(self) -> dict[str, str]:
        """``RateLimit`` of draft-ietf-httpapi-ratelimit-headers-10; ``t``: seconds until it is full."""
        refill = math.ceil((self.limit - self.remaining) * self.window / self.limit)
        return {
            "RateLimit-Policy": f'"key";q={self.limit};w={self.window}',
            "RateLimit": f'"key";r={self.remaining};t={refill}',
        }


class RateLimiter:
    """`rate_limit` requests per `rate_window_seconds` for each key, unless it has its own limit."""

    def __init__(self, client: RedisClient, settings: Settings) -> None:
        self._limit = settings.rate_limit
        self._window = settings.rate_window_seconds
        self._client = client

    def take(self, key_id: str, per_minute: int | None = None) -> RateDecision:
        """Count one request of this key; `per_minute` is the key's own limit. Raises StoreUnavailable."""
        limit, window = (self._limit, self._window) if per_minute is None else (per_minute, 60)
        with guard():
            allowed, left, wait_ms = self._client.execute_command(
                "EVAL", BUCKET, 1, f"{PREFIX}rate:{key_id}", limit, limit / window
            )
        return RateDecision(
            allowed=bool(allowed),
            limit=limit,
            window=window,
            remaining=int(left),
            retry_after=0 if allowed else max(1, math.ceil(wait_ms / 1000)),
        )
