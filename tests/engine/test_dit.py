import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from engine.diffusers_names import dit_name
from engine.dit import DiT, sinusoid
from engine.rope import axis_dims, rope_table
from tests.engine.oracle import TEXT_DIM, TEXT_LEN, relative, tensors_without_effect, twin_dits

GRID = (3, 8, 10)  # latent frames, rows, columns: 3, 4 and 5 tokens, all different
EXACT = 2e-5  # fp32's rounding is about 4e-6; one GELU's other form would be more than this


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
    assert error < EXACT


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_every_norms_eps_is_the_configs(generator: torch.Generator, eps: float) -> None:
    """Where what is normed is as small as eps, another eps anywhere would be seen."""
    ours, theirs = twin_dits(generator, eps=eps)
    small = (
        "patch_embedding",
        ".self_attn.q",
        ".self_attn.k",
        ".cross_attn.q",
        ".cross_attn.k",
        ".o.",
        ".ffn.2.",
    )
    with torch.no_grad():
        for name, parameter in (
            *ours.named_parameters(),
            *((dit_name(name), parameter) for name, parameter in theirs.named_parameters()),
        ):
            if any(part in name for part in small):
                parameter.mul_(eps**0.5)
    latents = torch.randn(1, 16, *GRID, generator=generator)
    text = torch.randn(1, TEXT_LEN, TEXT_DIM, generator=generator)
    with torch.no_grad():
        got = ours(latents, torch.tensor([[700.0]]), ours.encode_text(text))
        expected = theirs(latents, torch.tensor([700.0]), text).sample
    assert relative(got, expected) < 1e-4


def test_two_timestep_sets_match_diffusers_per_token_timesteps(generator: torch.Generator) -> None:
    ours, theirs = twin_dits(generator, 48, 48)
    latents = torch.randn(1, 48, *GRID, generator=generator)
    text = torch.randn(1, TEXT_LEN, TEXT_DIM, generator=generator)
    per_token = torch.full((1, 3 * 4 * 5), 700.0)
    per_token[:, : 4 * 5] = 0  # the first latent frame's tokens
    got = ours(latents, torch.tensor([[0.0, 700.0]]), ours.encode_text(text))
    with torch.no_grad():
        expected = theirs(latents, per_token, text).sample
    assert relative(got, expected) < EXACT
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


def test_positions_are_turned_by_diffusers_angles_to_the_last_bit() -> None:
    """At a size whose angles fp32 could not hold well enough: 720p, 81 frames."""
    grid = (21, 45, 80)
    theirs = WanRotaryPosEmbed(128, (1, 1, 1), 1024)(torch.empty(1, 1, *grid))
    for got, each in zip(rope_table(grid, 128, torch.device("cpu")), theirs, strict=True):
        assert torch.equal(got, each.view(-1, 128)[:, ::2].float())


def test_a_position_table_made_while_serving_can_be_trained_with(generator: torch.Generator) -> None:
    ours, _ = twin_dits(generator, layers=1)
    latents = torch.randn(1, 16, *GRID, generator=generator)
    text = torch.randn(1, TEXT_LEN, TEXT_DIM, generator=generator)
    rope_table.cache_clear()
    with torch.inference_mode():
        ours(latents, torch.tensor([[5]]), ours.encode_text(text))
    ours.requires_grad_(True)
    ours(latents, torch.tensor([[5]]), ours.encode_text(text)).square().mean().backward()
    assert rope_table.cache_info().hits > 0


def test_timestep_sinusoid_is_that_of_fp64() -> None:
    """An angle near 999 in fp32 is off by up to 3e-5, a hundred times what fp32 results lose."""
    wave = sinusoid(torch.tensor([[999]]), 256)[0, 0]
    angles = [999 * 10_000 ** -(i / 128) for i in range(128)]
    exact = torch.tensor([f(angle) for f in (math.cos, math.sin) for angle in angles], dtype=torch.float64)
    assert (wave.double() - exact).abs().max() < 1e-7


def test_timestep_sinusoid_is_cosine_first() -> None:
    wave = sinusoid(torch.tensor([[2]]), 4)[0, 0]
    # t = 2 at rates 1 and 10000^(-1/2) = 0.01
    assert wave.tolist() == pytest.approx([-0.4161468, 0.9998000, 0.9092974, 0.01999867])
