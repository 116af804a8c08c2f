"""How far a video is and how long it will still take, from what this rank has measured and nothing else."""

import time
from dataclasses import dataclass, field

from engine.config import GenerationRequest, Progress
from jobs.job import Phase

# Share of the whole at which a phase begins and ends. Progress is a position on this fixed scale; for the
# clock there is `eta`.
SPANS = {Phase.ENCODING: (0.0, 0.02), Phase.DENOISING: (0.02, 0.9), Phase.DECODING: (0.9, 0.98)}
PUBLISHING_PROGRESS = 0.98
Shape = tuple[int, int, int, str]  # width, height, frames, quality preset


def shape_of(request: GenerationRequest) -> Shape:
    """What decides a step's and a decode's time."""
    return (*request.size, request.frame_num, request.quality)


@dataclass
class History:
    """Seconds measured by earlier videos of this process, by shape; a newer measurement replaces an older."""

    step_seconds: dict[Shape, float] = field(default_factory=dict)  # one denoising step
    decode_seconds: dict[Shape, float] = field(default_factory=dict)

    def decode(self, shape: Shape) -> float | None:
        """Seconds to decode this shape: as measured, or scaled by pixels (decoding is linear)."""
        if shape in self.decode_seconds:
            return self.decode_seconds[shape]
        for other, seconds in self.decode_seconds.items():
            return seconds * (shape[0] * shape[1] * shape[2]) / (other[0] * other[1] * other[2])
        return None


class Estimate:
    """Follows one video through its phases."""

    def __init__(self, request: GenerationRequest, history: History) -> None:
        self.phase = Phase.ENCODING
        self.step = 0
        self.steps = 1
        self.seconds: dict[str, float] = {}  # phase to wall seconds, for the phases that have ended
        self.changed_at = time.monotonic()
        self._shape = shape_of(request)
        self._total_steps = request.sampling_steps
        self._history = history
        self._phase_began = self.changed_at

    def update(self, progress: Progress) -> None:
        """Take in what the engine says after a step."""
        now = time.monotonic()
        phase = Phase(progress.phase)
        if phase is not self.phase:
            self.close(now)
            self.phase, self._phase_began = phase, now
        if phase is Phase.DENOISING and progress.step >= 1:
            self._history.step_seconds[self._shape] = (now - self._phase_began) / progress.step
        self.step, self.steps, self.changed_at = progress.step, max(progress.steps, 1), now

    def close(self, now: float | None = None) -> None:
        """End the current phase's clock."""
        now = time.monotonic() if now is None else now
        self.seconds[self.phase.value] = now - self._phase_began
        if self.phase is Phase.DECODING:
            self._history.decode_seconds[self._shape] = now - self._phase_began

    @property
    def progress(self) -> float:
        """Position from 0 to 1, never falling."""
        low, high = SPANS[self.phase]
        return low + (high - low) * min(self.step / self.steps, 1.0)

    @property
    def eta(self) -> float | None:
        """Seconds until the last frame is decoded; None as long as nothing comparable was measured.

        That is a step and a decode: without the second it would reach 0 with the whole decode to come. The
        time since the last step counts down.
        """
        since = time.monotonic() - self.changed_at
        decode = self._history.decode(self._shape)
        if self.phase is Phase.DECODING:
            if self.step and self.step < self.steps:
                spent = self.changed_at - self._phase_began
                return max(spent / self.step * (self.steps - self.step) - since, 0.0)
            return None if decode is None else max(decode - since, 0.0)
        per_step = self._history.step_seconds.get(self._shape)
        if per_step is None or decode is None:
            return None
        done = self.step if self.phase is Phase.DENOISING else 0
        return max(per_step * (self._total_steps - done) - since, 0.0) + decode
