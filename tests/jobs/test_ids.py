"""Ids sort in the order they were made in, and cannot be guessed from one another."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs import ids
from jobs.ids import new_id
from tests.support.clock import set_clock


def test_ids_sort_in_the_order_they_were_made_in(monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.time_ns()
    monkeypatch.setattr(ids, "_last", 0)  # put back afterwards: the clock below is years ahead
    made = [new_id("job") for _ in range(2000)]
    assert all(re.fullmatch(r"job_[0-9a-hjkmnp-tv-z]{25}", name) for name in made)
    now = 1_800_000_000_000_000_000
    for nanoseconds in (now, now, now + 999, now + 999_999, now + 1_000_000, now - 10**9):
        set_clock(monkeypatch, ids, time_ns=lambda at=nanoseconds: at)
        made.append(new_id("job"))
    assert made == sorted(set(made)), "within a microsecond, across a millisecond, after a clock went back"
    assert before < now, "the numbers above are of a later time than this test's first ids"


def test_threads_share_one_order() -> None:
    def some(_: int) -> list[str]:
        return [new_id("x") for _ in range(500)]

    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(some, range(8)))
    assert all(run == sorted(run) for run in runs)
    assert len({name for run in runs for name in run}) == 4000


def test_ids_of_one_moment_differ_in_seventy_random_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def value() -> int:
        number = 0
        for letter in new_id("x").removeprefix("x_"):
            number = number * 32 + ids.DIGITS.index(letter)
        return number

    monkeypatch.setattr(ids, "_last", 0)
    set_clock(monkeypatch, ids, time_ns=lambda: 1_700_000_000_123_456_789)
    first, *others = [value() for _ in range(64)]
    assert first >> 80 == 1_700_000_000_123, "milliseconds, as ids had before: old and new ones sort together"
    assert (first >> 70) & 1023 == 456
    assert others[0] >> 70 == (first >> 70) + 1
    ever = never = 0
    for other in [first, *others]:
        ever |= other
        never |= ~other
    assert (ever & never) & ((1 << 70) - 1) == (1 << 70) - 1, "each bit is sometimes 1 and sometimes 0"
