"""Flow-matching schedules and solvers: UniPC (order 2, B2) and DPM-Solver++ (order 2, multistep midpoint).

A schedule is sigma_0 > ... > sigma_n = 0 with x_t = (1 - sigma) video + sigma noise; the model predicts the
flow v = noise - video, so the video's estimate is x0 = x - sigma v, and both solvers integrate that estimate
in lambda = log((1 - sigma) / sigma).

Formulas: UniPC arXiv:2302.04867 (B(h) = e^h - 1, predict x0), DPM-Solver++ arXiv:2211.01095. Schedules: the
official `wan/utils/fm_solvers_unipc.py` and `fm_solvers.py`. Coefficients are fp32 scalars as there, so the
updates agree with it to the bit.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.config import Solver as SolverName

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a run."""

    sigmas: Tensor  # [steps + 1] fp32, the last is 0
    timesteps: Tensor  # [steps] int64, 0 to 1000: what the model is told

    @property
    def steps(self) -> int:
        """How many model evaluations (per guidance branch) the run takes."""
        return len(self.timesteps)


class Solver(Protocol):
    """Turns the model's predictions, one a step and in order, into the next latents."""

    schedule: Schedule

    def step(self, flow: Tensor, sample: Tensor) -> Tensor:
        """The latents at the next noise level from the flow predicted for `sample` at this one."""
        ...


def shifted(sigma: np.ndarray, shift: float) -> np.ndarray:
    """s sigma / (1 + (s - 1) sigma): more steps at high noise for s > 1."""
    return np.asarray(shift * sigma / (1 + (shift - 1) * sigma))


def make_schedule(solver: SolverName, steps: int, shift: float) -> Schedule:
    """The official schedule: from float32(0.999) for unipc, from 1 for dpm++, both to 0."""
    start = float(np.float32(0.999)) if solver == "unipc" else 1.0
    sigmas = shifted(np.linspace(start, 0.0, steps + 1)[:-1], shift)
    timesteps = torch.from_numpy((sigmas * TRAIN_TIMESTEPS).astype(np.int64))
    return Schedule(torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32)), timesteps)


def make_solver(solver: SolverName, schedule: Schedule) -> Solver:
    """A fresh solver for one run."""
    return UniPC(schedule) if solver == "unipc" else DPMSolver(schedule)


def log_snr(sigma: Tensor) -> Tensor:
    """lambda = log(1 - sigma) - log(sigma); -inf at sigma 1, inf at 0."""
    return torch.log(1 - sigma) - torch.log(sigma)


class UniPC:
    """Predictor and corrector of order 2; the first and the last step are of order 1."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.index = 0
        self.order = 0  # of the last predictor step
        self.estimates: list[Tensor] = []  # x0 of the last two steps
        self.last_sample: Tensor | None = None

    def step(self, flow: Tensor, sample: Tensor) -> Tensor:
        """Correct `sample` by what the model now says of it, then predict the next."""
        estimate = sample - self.schedule.sigmas[self.index] * flow
        if self.last_sample is not None:
            sample = self._correct(estimate, self.last_sample)
        self.estimates = [*self.estimates[-1:], estimate]
        self.order = min(2, self.schedule.steps - self.index, self.index + 1)
        self.last_sample = sample
        next_sample = self._predict(sample)
        self.index += 1
        return next_sample

    def _predict(self, sample: Tensor) -> Tensor:
        """UniP: from this noise level to the next."""
        sigma, sigma_next = self.schedule.sigmas[self.index], self.schedule.sigmas[self.index + 1]
        h = log_snr(sigma_next) - log_snr(sigma)
        e = torch.expm1(-h)
        x0 = self.estimates[-1]
        alpha = 1 - sigma_next
        base = sigma_next / sigma * sample - alpha * e * x0
        if self.order == 1:
            return base
        slope = (self.estimates[-2] - x0) / self._ratio(self.index - 1, self.index, h)
        return base - alpha * e * (0.5 * slope)

    def _correct(self, estimate: Tensor, last_sample: Tensor) -> Tensor:
        """UniC: the step that led here, done again with the estimate at its end."""
        sigma, sigma_here = self.schedule.sigmas[self.index - 1], self.schedule.sigmas[self.index]
        h = log_snr(sigma_here) - log_snr(sigma)
        e = torch.expm1(-h)
        x0 = self.estimates[-1]
        alpha = 1 - sigma_here
        base = sigma_here / sigma * last_sample - alpha * e * x0
        if self.order == 1:
            return base - alpha * e * (0.5 * (estimate - x0))
        ratio = self._ratio(self.index - 2, self.index - 1, h)
        rho_slope, rho_end = self._weights(ratio, -h, e)
        slope = (self.estimates[-2] - x0) / ratio
        return base - alpha * e * (rho_slope * slope + rho_end * (estimate - x0))

    def _ratio(self, earlier: int, here: int, h: Tensor) -> Tensor:
        """(lambda_earlier - lambda_here) / h, negative."""
        return (log_snr(self.schedule.sigmas[earlier]) - log_snr(self.schedule.sigmas[here])) / h

    @staticmethod
    def _weights(ratio: Tensor, hh: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """The corrector's two weights: solve [[1, 1], [ratio, 1]] rho = b, with phi functions of hh = -h."""
        phi_2 = e / hh - 1
        phi_3 = phi_2 / hh - 1 / 2
        matrix = torch.stack((torch.ones(2), torch.stack((ratio, torch.ones(())))))
        rho = torch.linalg.solve(matrix, torch.stack((phi_2 / e, phi_3 * 2 / e)))
        return rho[0], rho[1]


class DPMSolver:
    """DPM-Solver++ of order 2; the first and the last step are of order 1.

    At sigma 1 lambda is -inf, which makes the slope of the second step vanish: it is of order 1 too.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.index = 0
        self.last_estimate: Tensor | None = None

    def step(self, flow: Tensor, sample: Tensor) -> Tensor:
        """The next latents."""
        sigmas, i = self.schedule.sigmas, self.index
        x0 = sample - sigmas[i] * flow
        h = log_snr(sigmas[i + 1]) - log_snr(sigmas[i])
        weight = (1 - sigmas[i + 1]) * (torch.exp(-h) - 1.0)
        next_sample = sigmas[i + 1] / sigmas[i] * sample - weight * x0
        if self.last_estimate is not None and i < self.schedule.steps - 1:
            ratio = (log_snr(sigmas[i]) - log_snr(sigmas[i - 1])) / h
            next_sample = next_sample - 0.5 * weight * (1.0 / ratio * (x0 - self.last_estimate))
        self.last_estimate = x0
        self.index += 1
        return next_sample
