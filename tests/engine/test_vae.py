import copy

import pytest
import torch

from engine.config import VAEConfig
from engine.vae import VAE, fold_pixels, unfold_pixels
from engine.vae_blocks import Stream
from tests.engine.oracle import relative, tensors_without_effect, twin_vaes

KINDS = pytest.mark.parametrize("kind", ["2.1", "2.2"])


@KINDS
@pytest.mark.parametrize("frames", [1, 9])
def test_encode_and_decode_match_diffusers(generator: torch.Generator, kind: str, frames: int) -> None:
    twins = twin_vaes(generator, kind)
    video = torch.rand(1, 3, frames, 32, 48, generator=generator) * 2 - 1
    with torch.no_grad():
        latents = twins.ours.encode(video)
        encode_error = relative(latents, twins.their_encode(video))
        decode_error = relative(twins.ours.decode(latents).clamp(-1, 1), twins.their_decode(latents))
    print(f"relative error: encode {encode_error:.2e}, decode {decode_error:.2e}")
    assert encode_error < 1e-4
    assert decode_error < 1e-4


@KINDS
def test_chunks_come_as_one_frame_then_fours(kind: str) -> None:
    twins = twin_vaes(torch.Generator().manual_seed(0), kind, z_dim=4)
    latents = torch.randn(1, 4, 3, 2, 3)
    chunks = list(twins.ours.decode_chunks(latents))
    stride = twins.ours.config.stride[1]
    assert [tuple(chunk.shape) for chunk in chunks] == [
        (1, 3, frames, 2 * stride, 3 * stride) for frames in (1, 4, 4)
    ]
    assert torch.equal(torch.cat(chunks, dim=2), twins.ours.decode(latents))


@KINDS
def test_between_chunks_only_the_frames_that_count_stay_in_memory(kind: str) -> None:
    """A view of them would keep the whole chunk: 7 GiB more at 1280*720."""
    ours = twin_vaes(torch.Generator().manual_seed(0), kind, z_dim=4).ours
    decoding, encoding = Stream(), Stream()
    stride = ours.config.stride[1]
    for frames in (1, 4):
        ours.decoder.stream(torch.randn(1, 4, 1, 2, 3), decoding)
        pixels = torch.rand(1, 3, frames, 2 * stride, 3 * stride)
        ours.encoder.stream(fold_pixels(pixels) if kind == "2.2" else pixels, encoding)
        decoding.first = encoding.first = False
    for stream in (decoding, encoding):
        assert len(stream.past) > 10
        for past in stream.past.values():
            assert past.shape[2] <= 2
            assert past.untyped_storage().nbytes() == past.nbytes


@KINDS
def test_the_present_does_not_depend_on_the_future(generator: torch.Generator, kind: str) -> None:
    ours = twin_vaes(generator, kind, z_dim=4).ours
    latents = torch.randn(1, 4, 3, 2, 3, generator=generator)
    assert torch.equal(ours.decode(latents)[:, :, :5], ours.decode(latents[:, :, :2]))


@KINDS
def test_every_tensor_counts(generator: torch.Generator, kind: str) -> None:
    ours = twin_vaes(generator, kind, z_dim=4).ours
    # Two latent frames, since the time convolutions skip the first.
    stride = ours.config.stride[1]
    video = torch.rand(1, 3, 5, stride, stride, generator=generator) * 2 - 1
    latents = torch.randn(1, 4, 2, 1, 1, generator=generator)
    outputs = {
        ("encoder.", "conv1."): lambda: torch.cat(ours.encode_moments(video)),
        ("decoder.", "conv2."): lambda: ours.decode(latents),
    }
    with torch.inference_mode():
        assert [tensors_without_effect(ours, output, prefix) for prefix, output in outputs.items()] == [
            [],
            [],
        ]


@KINDS
def test_gradients_flow_through_all_chunks(kind: str) -> None:
    new = kind == "2.2"
    config = VAEConfig("2.2" if new else "2.1", 20, 20, 4, (0.0,) * 4, (1.0,) * 4, stride=(4, 16, 16))
    torch.manual_seed(0)
    vae = VAE(config)
    for block in (vae.encoder.middle[1], vae.decoder.middle[1]):
        torch.nn.init.normal_(
            block.proj.weight, std=0.1
        )  # zero at the start, which stops gradients before it
    video = torch.rand(1, 3, 9, 16, 32, requires_grad=True)
    vae.decode(vae.encode(video)).square().mean().backward()
    assert video.grad is not None
    assert all(video.grad[:, :, frame].any() for frame in range(9))
    assert [name for name, p in vae.named_parameters() if p.grad is None] == []


@KINDS
def test_an_image_beyond_fp16_is_encoded_again(
    generator: torch.Generator, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    vae = twin_vaes(generator, kind).ours.requires_grad_(False)
    plain = copy.deepcopy(vae)
    for parameter in vae.encoder.conv1.parameters():  # within fp16's range; what they add up to is beyond it
        parameter.data.mul_(6e4 / parameter.abs().max())
    video = torch.rand(1, 3, 5, 32, 32, generator=generator) * 2 - 1
    expected = vae.encode(video)
    got = copy.deepcopy(vae).half().encode(video.half())
    assert "left fp16's range" in caplog.text
    assert relative(got.float(), expected) < 0.05
    caplog.clear()
    plain.half().encode(video.half())
    assert not caplog.text


def test_a_wrong_number_of_frames_is_refused() -> None:
    vae = twin_vaes(torch.Generator().manual_seed(0), "2.1", z_dim=4).ours
    with pytest.raises(ValueError, match=r"8 frames.*4n\+1"):
        vae.encode(torch.zeros(1, 3, 8, 16, 16))


def test_pixels_fold_with_the_column_before_the_row() -> None:
    # One channel of 2x2 pixels: rows (0, 1), (2, 3). Width's sub-pixel is the outer index: 0, 2, 1, 3.
    folded = fold_pixels(torch.arange(4.0).view(1, 1, 1, 2, 2))
    assert folded.flatten().tolist() == [0, 2, 1, 3]
    video = torch.randn(2, 3, 2, 4, 6)
    assert torch.equal(unfold_pixels(fold_pixels(video)), video)
