"""Ids that sort by the time they were made."""

import secrets
import threading
import time

DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford base 32, lower case
RANDOM_BITS = 70

_lock = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """A sortable random id, such as ``job_0ljv4k1x3c…``.

    44 bits of Unix milliseconds, 10 bits of the microseconds in it, 70 random bits. Those of one process
    sort in the order they were made in, also within a microsecond or after its clock went back.
    """
    value = (_tick() << RANDOM_BITS) | secrets.randbits(RANDOM_BITS)
    text = ""
    for _ in range(25):
        value, digit = divmod(value, 32)
        text = DIGITS[digit] + text
    return f"{prefix}_{text}"


def _tick() -> int:
    global _last
    milliseconds, microseconds = divmod(time.time_ns() // 1000, 1000)
    with _lock:
        _last = max(_last + 1, (milliseconds << 10) | microseconds)
        return _last
