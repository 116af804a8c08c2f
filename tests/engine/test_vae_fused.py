"""The fused decoder against the plain one, on a CPU through the kernels' references."""

import copy
import logging
from unittest import mock

import pytest
import torch
from torch import Tensor

from engine import vae_chunks, vae_fused
from engine.config import VAEConfig
from engine.tiny import randomize
from engine.vae import VAE
from engine.vae_blocks import WholeFrame
from engine.vae_graph import BEFORE, Recordings
from tests.engine.oracle import relative

KINDS = pytest.mark.parametrize("kind", ["2.1", "2.2"])


def make_vae(generator: torch.Generator, kind: str) -> VAE:
    """A small VAE in which every tensor counts; its latents have a mean and a spread."""
    new = kind == "2.2"
    stride = (4, 16, 16) if new else (4, 8, 8)
    vae = VAE(VAEConfig("2.2" if new else "2.1", 8, 8, 4, (0.1,) * 4, (1.2,) * 4, stride=stride))
    randomize(vae, generator)
    return vae.requires_grad_(False).eval()


def fused_decode(vae: VAE, latents: Tensor) -> Tensor:
    with mock.patch.object(vae_fused, "applies", return_value=True), torch.inference_mode():
        return vae.decode(latents)


@KINDS
@pytest.mark.parametrize(("frames", "rows", "columns"), [(1, 1, 1), (2, 3, 5), (4, 5, 2), (3, 1, 4)])
def test_fused_is_plain(generator: torch.Generator, kind: str, frames: int, rows: int, columns: int) -> None:
    vae = make_vae(generator, kind)
    latents = torch.randn(1, 4, frames, rows, columns, generator=generator)
    error = relative(fused_decode(vae, latents), vae.decode(latents))
    print(f"relative error {error:.2e}")
    assert error < 1e-5


@KINDS
def test_a_batch_and_each_chunk_as_it_comes(generator: torch.Generator, kind: str) -> None:
    vae = make_vae(generator, kind)
    latents = torch.randn(2, 4, 3, 2, 3, generator=generator)
    with mock.patch.object(vae_fused, "applies", return_value=True), torch.inference_mode():
        for got, want in zip(vae.decode_chunks(latents), chunks(vae, latents), strict=True):
            assert relative(got, want) < 1e-5


def chunks(vae: VAE, latents: Tensor) -> list[Tensor]:
    with mock.patch.object(vae_fused, "applies", return_value=False):
        return list(vae.decode_chunks(latents))


@KINDS
def test_a_smaller_residual_stream_gives_the_same_video(generator: torch.Generator, kind: str) -> None:
    vae = make_vae(generator, kind)
    latents = torch.randn(1, 4, 2, 2, 3, generator=generator)
    want = vae.decode(latents)
    with torch.inference_mode():
        vae.decoder = vae_chunks.scaled_down(vae.decoder, 2.0**-6)
        assert relative(vae.decode(latents), want) < 1e-5


def scaled_up(vae: VAE, factor: float) -> VAE:
    """The same video by a residual stream that many times as large."""
    vae.decoder = vae_chunks.scaled_down(vae.decoder, factor)
    return vae


def half_precision(vae: VAE, latents: Tensor) -> Tensor:
    return fused_decode(vae.half(), latents.half()).float()


@pytest.mark.parametrize(("factor", "again"), [(2.0**8, 0), (2.0**15, 1)])
def test_fp16_range_is_guarded(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture, factor: float, again: int
) -> None:
    """Activations scaled up, also beyond fp16's range: noticed, decoded again, and as exact as they were."""
    vae = make_vae(generator, "2.1")
    latents = torch.randn(1, 4, 3, 2, 3, generator=generator)
    want = vae.decode(latents)
    usual = relative(half_precision(copy.deepcopy(vae), latents), want)
    assert usual < 5e-3
    # Weights carry the factor: all fit in fp16, but not the sums of their products with 2^15.
    vae = scaled_up(vae, factor)
    with caplog.at_level(logging.WARNING):
        got = half_precision(vae, latents)
    print(f"relative error {relative(got, want):.2e}, usually {usual:.2e}; {caplog.text}")
    assert relative(got, want) < 1.3 * usual
    assert caplog.text.count("left fp16's range") == again


def test_beyond_what_a_smaller_stream_holds_bf16_decodes(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    """One wild latent pixel through an outlier channel, 2^11 times it: finite, and right to bf16's precision.

    Weights are as small as a real checkpoint's: 2^-12 of them is nothing in fp16.
    """
    vae = make_vae(generator, "2.1")
    with torch.no_grad():
        for name, weight in vae.decoder.named_parameters():
            if weight.ndim > 3 and "head" not in name:
                weight.mul_(0.01 / weight.std())
        vae.decoder.conv1.weight[0] = 0
        vae.decoder.conv1.weight[0, :, :, 1, 1] = 2.0**11
    latents = torch.randn(1, 4, 2, 2, 6, generator=generator)
    latents[..., -1, -1] = latents[..., -1, -1].sign() * 1e4
    with torch.inference_mode():
        want = vae.decode(latents)
        with caplog.at_level(logging.WARNING):
            got = fused_decode(vae.half(), latents.half())
    print(f"relative error {relative(got.float(), want):.2e}; {caplog.text}")
    assert "decoded again in bfloat16" in caplog.text
    assert got.dtype == torch.float16  # as the chunks before it are
    assert relative(got.float(), want) < 2e-2


@pytest.mark.parametrize("frames", [1, 2])
def test_a_video_of_one_chunk_and_one_to_be_replayed_are_guarded_too(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture, frames: int
) -> None:
    """No later chunk asks for the last one's range, and a recording of the first try is no second try."""
    vae = make_vae(generator, "2.1")
    latents = torch.randn(1, 4, frames, 2, 3, generator=generator)
    want = vae.decode(latents)
    vae = scaled_up(vae, 2.0**15)
    vae.recordings = Recordings()
    for video in (1, 2):
        with caplog.at_level(logging.WARNING):
            assert relative(half_precision(vae, latents), want) < 1e-2
        assert caplog.text.count("left fp16's range") == video


class Doubting(WholeFrame):
    """A rank that hears of the chunk with this number that another one's stripe isn't finite, once."""

    def __init__(self, chunk: int) -> None:
        self.chunk, self.seen = chunk, 0

    def all_agree(self, flag: Tensor) -> Tensor:
        self.seen += 1
        return flag & (self.seen != self.chunk)


@pytest.mark.parametrize("chunk", [1, 2])
def test_what_is_beyond_fp16_on_another_rank_is_decoded_again_on_all(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture, chunk: int
) -> None:
    """Else the ranks' exchanges would be of different tries."""
    vae = make_vae(generator, "2.1")
    latents = torch.randn(1, 4, 2, 2, 3, generator=generator)
    want = vae.decode(latents)
    with mock.patch.object(vae_fused, "applies", return_value=True), torch.inference_mode():
        chunks = list(vae.half().decode_chunks(latents.half(), Doubting(chunk)))
    assert [each.shape[2] for each in chunks] == [1, 4]
    assert relative(torch.cat(chunks, dim=2).float(), want) < 1e-2
    assert f"latent frame {chunk} of 2 left fp16's range" in caplog.text


def test_a_recording_is_only_of_its_own_shape_and_stripes(generator: torch.Generator) -> None:
    fused = vae_fused.FusedDecoder(make_vae(generator, "2.1").decoder)
    recordings, z = Recordings(), torch.zeros(1, 4, 2, 3, 5)
    first = recordings.of(fused, z)
    assert recordings.of(fused, torch.zeros(1, 4, 9, 3, 5)) is first  # of any length
    for other in (z.half(), z[..., :4], z[..., :2, :], z.repeat(2, 1, 1, 1, 1)):
        assert recordings.of(fused, other) is not first
        first = recordings.of(fused, z)
    fused.space.division = (3, 5, -1, 3, 2)
    assert recordings.of(fused, z) is not first


def test_only_half_precision_without_gradients_runs_fused() -> None:
    half = torch.empty(1, dtype=torch.float16, device="meta")
    with torch.no_grad():
        assert vae_fused.applies(half)
        assert not vae_fused.applies(half.float())
        assert not vae_fused.applies(torch.empty(1, dtype=torch.float16))
    with torch.enable_grad():
        assert not vae_fused.applies(half)


def test_latents_that_are_not_finite_end(
    generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    """No scale mends those: their frames come out as they are, after the last try."""
    vae = make_vae(generator, "2.1")
    latents = torch.randn(1, 4, 3, 1, 2, generator=generator)
    latents[:, :, 1] = float("nan")
    got = half_precision(vae, latents)
    assert got.shape == vae.float().decode(latents).shape
    assert got[:, :, :1].isfinite().all()
    assert got[:, :, 1:].isnan().any()
    assert caplog.text.count("left fp16's range") == vae_chunks.TRIES - 1


@KINDS
def test_what_a_recording_relies_on(generator: torch.Generator, kind: str) -> None:
    """From `BEFORE` on, frames have one shape, and all that the layers remember stays where it is."""
    vae = make_vae(generator, kind)
    fused = vae_fused.FusedDecoder(vae.decoder)
    places: list[dict[object, int]] = []
    shapes = []
    with torch.inference_mode():
        for _ in range(BEFORE + 3):
            shapes.append(fused.frames(torch.randn(1, 4, 1, 3, 5, generator=generator)).shape)
            places.append({layer: past.data_ptr() for layer, past in fused.stream.past.items()})
    assert places[BEFORE - 1]
    assert all(one == places[BEFORE - 1] for one in places[BEFORE:])
    assert set(shapes[BEFORE:]) == {shapes[BEFORE - 1]}


@KINDS
def test_the_next_video_begins_as_the_first_did(generator: torch.Generator, kind: str) -> None:
    vae = make_vae(generator, kind)
    fused = vae_fused.FusedDecoder(vae.decoder)
    latents = torch.randn(2, 1, 4, 4, 3, 2, generator=generator)
    with torch.inference_mode():
        for video in (latents[0], latents[1, :, :, :2], latents[0]):  # the second ends early
            fresh = vae_fused.FusedDecoder(vae.decoder)
            for z in torch.split(video, 1, dim=2):
                assert torch.equal(fused.frames(z), fresh.frames(z))
            places = {layer: past.data_ptr() for layer, past in fused.stream.past.items()}
            fused.restart()
            assert places == {layer: past.data_ptr() for layer, past in fused.stream.past.items()}
