"""Progress never falls, and an eta is only given from what was measured."""

import pytest

from engine.config import GenerationRequest, Progress
from worker import estimate
from worker.estimate import Estimate, History


class Clock:
    """Stands in for the time module."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(estimate, "time", found)
    return found


def request(frames: int = 9, steps: int = 4) -> GenerationRequest:
    return GenerationRequest("a cat", (64, 48), frames, 5.0, steps, (3.0, 4.0), 1)


def run(clock: Clock, history: History, frames: int = 9) -> list[tuple[float, float | None]]:
    """One video of 2 s steps and a 4 s decode: (progress, eta) after each report."""
    follow = Estimate(request(frames), history)
    seen = []
    for phase, step, steps, seconds in [
        ("encoding", 0, 1, 0.0), ("denoising", 0, 4, 1.0), *[("denoising", n, 4, 2.0) for n in (1, 2, 3, 4)],
        ("decoding", 0, 2, 0.0), ("decoding", 1, 2, 2.0), ("decoding", 2, 2, 2.0),
    ]:  # fmt: skip
        clock.now += seconds
        follow.update(Progress(phase, step, steps))  # type: ignore[arg-type]
        seen.append((follow.progress, follow.eta))
    follow.close()
    return seen


def test_progress_rises_and_the_first_eta_waits_for_the_first_decode(clock: Clock) -> None:
    seen = run(clock, History())
    progress = [one for one, _ in seen]
    assert progress == sorted(progress)
    assert 0 <= progress[0] < progress[-1] <= 1
    etas = [eta for _, eta in seen]
    assert etas[:7] == [None] * 7, "steps alone would end in 0 s with the whole decode to come"
    assert etas[7] == pytest.approx(2.0)


def test_the_second_video_knows_from_the_start(clock: Clock) -> None:
    history = History()
    run(clock, history)
    etas = [eta for _, eta in run(clock, history)]
    assert etas[0] == pytest.approx(4 * 2.0 + 4.0)
    assert etas[3] == pytest.approx(2 * 2.0 + 4.0)
    assert etas[6] == pytest.approx(4.0)


def test_another_shape_takes_only_the_decode_over(clock: Clock) -> None:
    history = History()
    run(clock, history)
    assert history.decode((64, 48, 18)) == pytest.approx(8.0)
    assert Estimate(request(frames=17), history).eta is None


def test_a_decode_known_from_another_shape_counts_from_the_first_step(clock: Clock) -> None:
    history = History()
    run(clock, history)
    etas = [eta for _, eta in run(clock, history, frames=18)]
    assert etas[:2] == [None, None]
    assert etas[2] == pytest.approx(3 * 2.0 + 8.0)


def test_an_eta_counts_down_between_steps(clock: Clock) -> None:
    history = History()
    run(clock, history)
    follow = Estimate(request(), history)
    before = follow.eta
    clock.now += 1.5
    assert before is not None
    assert follow.eta == pytest.approx(before - 1.5)
    clock.now += 1000
    assert follow.eta is not None
    assert follow.eta >= 0
