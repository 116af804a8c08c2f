import pytest
import torch
from torch import Tensor

from engine.dit import DiT, sinusoid
from engine.rope import axis_dims, rope_table
from tests.engine.oracle import TEXT_DIM, TEXT_LEN, relative, tensors_without_effect, twin_dits

GRID = (3, 6, 10)  # latent frames, rows, columns: all different


@pytest.mark.parametrize(("in_channels", "out_channels"), [(16, 16), (36, 16), (48, 48)])
def test_forward_matches_diffusers(generator: torch.Generator, in_channels: int, out_channels: int) -> None:
    ours, theirs = twin_dits(generator, in_channels, out_channels)
    latents = torch.randn(1, in_channels, *GRID, generator=generator)
    text = torch.randn(2, TEXT_LEN, TEXT_DIM, generator=generator)
    got = ours(latents, torch.tensor([[700.0]]), ours.encode_text(text))
    with torch.no_grad():
        expected = [theirs(latents, torch.tensor([700.0]), row[None]).sample for row in text]
    error = relative(got, torch.cat(expected))
    print(f"relative error {error:.2e}")
    assert error < 1e-4


def test_two_timestep_sets_match_diffusers_per_token_timesteps(generator: torch.Generator) -> None:
    ours, theirs = twin_dits(generator, 48, 48)
    latents = torch.randn(1, 48, *GRID, generator=generator)
    text = torch.randn(1, TEXT_LEN, TEXT_DIM, generator=generator)
    per_token = torch.full((1, 3 * 3 * 5), 700.0)
    per_token[:, : 3 * 5] = 0  # the first latent frame's tokens
    got = ours(latents, torch.tensor([[0.0, 700.0]]), ours.encode_text(text))
    with torch.no_grad():
        expected = theirs(latents, per_token, text).sample
    assert relative(got, expected) < 1e-4
    assert relative(ours(latents, torch.tensor([[700.0]]), ours.encode_text(text)), expected) > 1e-2


def test_every_tensor_counts(generator: torch.Generator) -> None:
    ours, _ = twin_dits(generator, layers=1)
    latents = torch.randn(1, 16, *GRID, generator=generator)
    text = torch.randn(1, TEXT_LEN, TEXT_DIM, generator=generator)
    idle = tensors_without_effect(
        ours, lambda: ours(latents, torch.tensor([[300.0]]), ours.encode_text(text))
    )
    # A bias on keys shifts all of a query's scores alike, but here RMSNorm stands between: it counts too.
    assert idle == []


def test_a_batch_of_texts_is_the_texts_one_by_one(generator: torch.Generator) -> None:
    ours, _ = twin_dits(generator)
    latents = torch.randn(1, 16, *GRID, generator=generator)
    text = torch.randn(2, TEXT_LEN, TEXT_DIM, generator=generator)

    def run(rows: Tensor) -> Tensor:
        return ours(latents, torch.tensor([[500]]), ours.encode_text(rows))

    assert relative(run(text), torch.cat([run(text[:1]), run(text[1:])])) < 1e-5


def test_gradients_reach_every_tensor(generator: torch.Generator) -> None:
    ours, _ = twin_dits(generator, layers=1)
    ours.requires_grad_(True)
    latents = torch.randn(2, 16, 1, 4, 6, generator=generator)
    text = torch.randn(2, TEXT_LEN, TEXT_DIM, generator=generator)
    ours(latents, torch.tensor([[100.0], [900.0]]), ours.encode_text(text)).square().mean().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_official_initialisation_predicts_zero() -> None:
    ours, _ = twin_dits(torch.Generator().manual_seed(0))
    fresh = DiT(ours.config)
    fresh.init_weights()
    text = fresh.encode_text(torch.ones(1, TEXT_LEN, TEXT_DIM))
    assert not fresh(torch.ones(1, 16, *GRID), torch.tensor([[5]]), text).any()


def test_latents_that_do_not_divide_into_patches_are_refused() -> None:
    ours, _ = twin_dits(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"\(3, 5, 10\).*don't divide"):
        ours.token_grid(torch.zeros(1, 16, 3, 5, 10))


def test_rope_axes_of_head_128_are_44_42_42() -> None:
    assert axis_dims(128) == (44, 42, 42)
    cos, sin = rope_table((2, 3, 4), 128, torch.device("cpu"))
    assert cos.shape == sin.shape == (24, 64)
    # Token (1, 2, 3) is the last: its first pair turns by 1 frame, the row pairs start at 22, columns at 43.
    assert cos[-1, 0] == pytest.approx(0.5403023)  # cos 1
    assert sin[-1, 22] == pytest.approx(0.9092974)  # sin 2
    assert sin[-1, 43] == pytest.approx(0.1411200)  # sin 3


def test_timestep_sinusoid_is_cosine_first() -> None:
    wave = sinusoid(torch.tensor([[2]]), 4)[0, 0]
    # t = 2 at rates 1 and 10000^(-1/2) = 0.01
    assert wave.tolist() == pytest.approx([-0.4161468, 0.9998000, 0.9092974, 0.01999867])
