"""The VAE's decode as the engine runs it on a GPU, against the plain decoder in fp32."""

import copy

import pytest
import torch

from benchmarks._official_vae import decode
from benchmarks._random_vae import random_vae
from benchmarks.vae import psnr
from engine import vae_chunks, vae_fused
from engine.vae_graph import BEFORE, Recordings

CUDA = torch.device("cuda")


@pytest.mark.parametrize(("frames", "rows", "columns"), [(3, 30, 52), (2, 31, 17), (1, 1, 1)])
def test_fp16_is_as_good_as_tf32(frames: int, rows: int, columns: int):
    vae = random_vae(CUDA, torch.float32)
    latents = torch.randn(1, 16, frames, rows, columns, device=CUDA)
    with torch.inference_mode():
        want = decode(vae, latents)
        in_half = copy.deepcopy(vae).half()
        assert vae_fused.applies(in_half.conv2.weight)
        assert psnr(in_half.decode(latents.half()), want) >= 60


def test_activations_beyond_fp16_are_decoded_again(caplog: pytest.LogCaptureFixture):
    vae = random_vae(CUDA, torch.float32)
    latents = torch.randn(1, 16, 2, 8, 12, device=CUDA)
    with torch.inference_mode():
        want = decode(vae, latents)
        vae.decoder = vae_chunks.scaled_down(vae.decoder, 2.0**16)
        got = vae.half().decode(latents.half())
    assert caplog.text.count("left fp16's range") == 1
    assert psnr(got, want) >= 60


@pytest.mark.parametrize(("rows", "columns"), [(30, 52), (31, 17)])
def test_replayed_chunks_are_the_same_to_the_bit(rows: int, columns: int):
    vae = random_vae(CUDA)
    videos = [torch.randn(1, 16, BEFORE + 4, rows, columns, device=CUDA).half() for _ in range(2)]
    with torch.inference_mode():
        want = [vae.decode(latents) for latents in videos]
        vae.recordings = Recordings()
        for latents, one in zip(videos * 2, want * 2, strict=True):  # all but the first from the start
            assert torch.equal(vae.decode(latents), one)


def test_replayed_chunks_beyond_fp16_are_decoded_again(caplog: pytest.LogCaptureFixture):
    vae = random_vae(CUDA, torch.float32)
    latents = torch.randn(1, 16, BEFORE + 3, 8, 12, device=CUDA)
    with torch.inference_mode():
        want = decode(vae, latents)
        vae.decoder = vae_chunks.scaled_down(vae.decoder, 2.0**16)
        vae = vae.half()
        vae.recordings = Recordings()
        got = vae.decode(latents.half())
    assert caplog.text.count("left fp16's range") == 1
    assert psnr(got, want) >= 60
