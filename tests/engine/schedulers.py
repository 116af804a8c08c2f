"""Diffusers' schedulers, kept to our sigmas."""

from typing import TypeVar

from engine.sampler import Schedule

S = TypeVar("S")


def with_sigmas(oracle: S, schedule: Schedule) -> S:
    """The scheduler with the sigmas and timesteps of ours, whatever number of steps it is asked for."""
    original = oracle.set_timesteps  # type: ignore[attr-defined]

    def set_timesteps(steps: int, device: object = None) -> None:
        original(steps)
        oracle.sigmas = schedule.sigmas  # type: ignore[attr-defined]
        oracle.timesteps = schedule.timesteps  # type: ignore[attr-defined]

    oracle.set_timesteps = set_timesteps  # type: ignore[attr-defined]
    return oracle
