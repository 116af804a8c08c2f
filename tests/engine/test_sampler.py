import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from engine.config import Solver
from engine.sampler import make_schedule, make_solver
from tests.engine.oracle import relative


def test_unipc_schedule_by_hand() -> None:
    """4 steps, shift 12. The unshifted sigmas are 0.999 * (1, 3/4, 1/2, 1/4).

    Shifted, 12 s / (1 + 11 s):
      0.999   -> 11.988 / 11.989   = 0.99991659   t = 999
      0.74925 -> 8.991 / 9.24175   = 0.97286769   t = 972
      0.4995  -> 5.994 / 6.4945    = 0.92293479   t = 922
      0.24975 -> 2.997 / 3.74725   = 0.79978651   t = 799
    """
    schedule = make_schedule("unipc", 4, 12.0)
    assert schedule.timesteps.tolist() == [999, 972, 922, 799]
    expected = [0.99991659, 0.97286769, 0.92293479, 0.79978651, 0.0]
    assert schedule.sigmas.tolist() == pytest.approx(expected, abs=1e-7)
    assert schedule.sigmas.dtype == torch.float32
    assert schedule.steps == 4


def test_dpm_schedule_by_hand() -> None:
    """4 steps, shift 5: s = 1, 3/4, 1/2, 1/4 -> 5 s / (1 + 4 s) = 1, 15/16, 5/6, 5/8."""
    schedule = make_schedule("dpm++", 4, 5.0)
    assert schedule.sigmas.tolist() == pytest.approx([1.0, 0.9375, 0.8333333, 0.625, 0.0])
    assert schedule.timesteps.tolist() == [1000, 937, 833, 625]


def test_unipc_starts_at_float32_of_0_999() -> None:
    """float32(0.999) = 0.9990000128746033. With shift 1 and 3 steps the second sigma, two thirds of it, is
    0.666000008..., so 1000 times it truncates to 666; float64's 0.999 gives 665.999..., which is 665."""
    assert make_schedule("unipc", 3, 1.0).timesteps.tolist() == [999, 666, 333]
    assert (np.linspace(0.999, 0, 4)[:3] * 1000).astype(int).tolist() == [999, 665, 332]


@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40])
def test_unipc_updates_match_diffusers(generator: torch.Generator, steps: int, shift: float) -> None:
    schedule = make_schedule("unipc", steps, shift)
    oracle = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, solver_order=2
    )
    assert run(generator, "unipc", steps, shift, oracle, schedule.sigmas) < 1e-6


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, with NumPy 2
@pytest.mark.parametrize("shift", [1.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40])
def test_dpm_updates_match_diffusers(generator: torch.Generator, steps: int, shift: float) -> None:
    schedule = make_schedule("dpm++", steps, shift)
    oracle = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    assert run(generator, "dpm++", steps, shift, oracle, schedule.sigmas) < 1e-6


def run(
    generator: torch.Generator, name: Solver, steps: int, shift: float, oracle: object, sigmas: Tensor
) -> float:
    """Relative error after all steps, both fed the same random flows, from the same noise and sigmas."""
    solver = make_solver(name, make_schedule(name, steps, shift))
    oracle.set_timesteps(steps)  # type: ignore[attr-defined]
    oracle.sigmas = sigmas  # type: ignore[attr-defined]
    oracle.timesteps = torch.arange(steps).flip(0)  # type: ignore[attr-defined]
    ours = theirs = torch.randn(1, 4, 2, 3, 5, generator=generator)
    for t in oracle.timesteps:  # type: ignore[attr-defined]
        flow = torch.randn(1, 4, 2, 3, 5, generator=generator)
        ours = solver.step(flow, ours)
        theirs = oracle.step(flow, t, theirs).prev_sample  # type: ignore[attr-defined]
        assert ours.isfinite().all()
    return relative(ours, theirs)


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_a_perfect_model_recovers_the_video(generator: torch.Generator, name: Solver) -> None:
    """With the true flow noise - video at every level, any number of steps ends at the video."""
    video, noise = torch.randn(2, 4, 3, generator=generator)
    schedule = make_schedule(name, 9, 5.0)
    solver = make_solver(name, schedule)
    # Start where the schedule does, at sigma_0 rather than at pure noise.
    latents = (1 - schedule.sigmas[0]) * video + schedule.sigmas[0] * noise
    for _ in range(schedule.steps):
        latents = solver.step(noise - video, latents)
    assert relative(latents, video) < 1e-5
