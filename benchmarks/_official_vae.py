"""The VAE's decoder as the official code computes it, in plain torch: the baseline of the decode's ratio.

Written from the order of operations of the official `wan/modules/vae2_1.py` (Wan-Video/Wan2.2, Apache-2.0):
one latent frame at a time; each causal convolution keeps a copy of its last two input frames, joins them to
the next ones and pads all sides itself; norm, SiLU, doubling and sums are passes of their own; the video is
joined anew after every latent frame. Weights are the engine's own VAE's, in fp32.

Shapes: B batch, C channels, T frames, F latent frames, H rows, W columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.vae import VAE
from engine.vae_blocks import AttentionBlock, CausalConv3d, ChannelNorm, ResidualBlock, Upsample

KEPT = 2  # frames that a convolution remembers
Cache = dict[nn.Module, Tensor]


def convolution(layer: CausalConv3d, x_BCTHW: Tensor, past_BCTHW: Tensor | None = None) -> Tensor:
    """All padding is explicit; what the past doesn't fill of the temporal padding is zeros."""
    before = layer.kernel_size[0] - 1
    rows, columns = (size // 2 for size in layer.kernel_size[1:])
    if past_BCTHW is not None and before:
        x_BCTHW = torch.cat([past_BCTHW, x_BCTHW], dim=2)
        before -= past_BCTHW.shape[2]
    x_BCTHW = F.pad(x_BCTHW, (columns, columns, rows, rows, before, 0))
    return F.conv3d(x_BCTHW, layer.weight, layer.bias)


def cached(layer: CausalConv3d, x_BCTHW: Tensor, cache: Cache, first_zeros: bool = False) -> Tensor:
    """A convolution that remembers; `first_zeros`: a lone frame's forerunner counts as zeros."""
    past = cache.get(layer)
    kept = x_BCTHW[:, :, -KEPT:].clone()
    if kept.shape[2] < KEPT and past is not None:
        kept = torch.cat([past[:, :, -1:], kept], dim=2)
    elif kept.shape[2] < KEPT and first_zeros:
        kept = torch.cat([torch.zeros_like(kept), kept], dim=2)
    y = convolution(layer, x_BCTHW, past)
    cache[layer] = kept
    return y


def norm(layer: nn.Module, x: Tensor) -> Tensor:
    """The official RMS_norm: unit length over channels, times sqrt(C) and the gain, in x's dtype."""
    assert isinstance(layer, ChannelNorm)
    out: Tensor = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * layer.gamma
    return out


def residual(block: ResidualBlock, x: Tensor, cache: Cache) -> Tensor:
    """Norm, SiLU, convolution, twice; the shortcut is computed first."""
    shortcut = block.shortcut
    h = convolution(shortcut, x) if isinstance(shortcut, CausalConv3d) else x
    for name, conv in (("0", "2"), ("3", "6")):
        layer = block.residual[conv]
        assert isinstance(layer, CausalConv3d)
        x = cached(layer, F.silu(norm(block.residual[name], x)), cache)
    return x + h


def attention(block: AttentionBlock, x_BCTHW: Tensor) -> Tensor:
    """One head over each frame's pixels."""
    b, c, t, h, w = x_BCTHW.shape
    x = x_BCTHW.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
    qkv = block.to_qkv(norm(block.norm, x)).reshape(b * t, 1, 3 * c, -1).permute(0, 1, 3, 2)
    qkv = qkv.clone(memory_format=torch.contiguous_format)  # of one pixel, contiguous() keeps odd strides
    q, k, v = qkv.chunk(3, dim=-1)
    y = F.scaled_dot_product_attention(q, k, v).squeeze(1).permute(0, 2, 1).reshape(b * t, c, h, w)
    y = block.proj(y)
    return y.view(b, t, c, h, w).permute(0, 2, 1, 3, 4) + x_BCTHW


def upsample(layer: Upsample, x_BCTHW: Tensor, cache: Cache, first: bool) -> Tensor:
    """Twice the frames (but the first), by pairs from a time convolution; then twice the rows and columns."""
    b, c, t, h, w = x_BCTHW.shape
    if layer.time_conv is not None and not first:
        x = cached(layer.time_conv, x_BCTHW, cache, first_zeros=True).reshape(b, 2, c, t, h, w)
        x_BCTHW = torch.stack((x[:, 0], x[:, 1]), 3).reshape(b, c, 2 * t, h, w)
    t = x_BCTHW.shape[2]
    x = x_BCTHW.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
    double, conv = layer.resample
    y: Tensor = conv(double(x.float()).type_as(x))
    return y.view(b, t, *y.shape[1:]).permute(0, 2, 1, 3, 4)


def decode_latent(vae: VAE, z_BC1HW: Tensor, cache: Cache, first: bool) -> Tensor:
    """One latent frame as 1 (the first) or 4 frames."""
    decoder = vae.decoder
    x = cached(decoder.conv1, z_BC1HW, cache)
    for layer in (*decoder.middle, *decoder.upsamples):
        if isinstance(layer, ResidualBlock):
            x = residual(layer, x, cache)
        elif isinstance(layer, AttentionBlock):
            x = attention(layer, x)
        else:
            assert isinstance(layer, Upsample)
            x = upsample(layer, x, cache, first)
    last = decoder.head["2"]
    assert isinstance(last, CausalConv3d)
    return cached(last, F.silu(norm(decoder.head["0"], x)), cache)


def decode(vae: VAE, latents_BCFHW: Tensor) -> Tensor:
    """The whole video [B, 3, 4F-3, 8H, 8W] of normalised latents, clamped; `vae` is of kind 2.1, in fp32."""
    assert vae.config.kind == "2.1"
    config, like = vae.config, latents_BCFHW
    mean, std = (like.new_tensor(v).view(1, -1, 1, 1, 1) for v in (config.latent_mean, config.latent_std))
    z = convolution(vae.conv2, latents_BCFHW / (1 / std) + mean)
    cache: Cache = {}
    out = decode_latent(vae, z[:, :, :1], cache, first=True)
    for i in range(1, z.shape[2]):
        out = torch.cat([out, decode_latent(vae, z[:, :, i : i + 1], cache, first=False)], dim=2)
    return out.float().clamp_(-1, 1)
