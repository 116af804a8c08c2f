"""Python processes with this folder on their path read the wall clock with an offset, taken from a file.

``REEL_CHAOS_SKEW`` names the file; it holds seconds, and may change at any time.
"""

import os
import time

_path = os.environ.get("REEL_CHAOS_SKEW", "")
_real, _real_ns = time.time, time.time_ns
_state = [0.0, 0.0]  # monotonic time of the last look, offset


def _offset() -> float:
    now = time.monotonic()
    if now - _state[0] > 0.2:
        _state[0] = now
        try:
            with open(_path) as file:  # noqa: PTH123 (pathlib would be imported into every process)
                _state[1] = float(file.read() or 0)
        except (OSError, ValueError):
            pass
    return _state[1]


if _path:
    time.time = lambda: _real() + _offset()
    time.time_ns = lambda: _real_ns() + int(_offset() * 1e9)
