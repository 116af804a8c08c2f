"""The causal 3-D VAEs of Wan 2.1 (A14B models) and Wan 2.2 (TI2V-5B): video to latents and back.

Latents are normalised per channel by the config's mean and standard deviation. The decoder streams: one
latent frame in, 1 (the first) or 4 video frames out, with the layers' memory in between.

Shapes: B batch, C latent channels, T video frames, F latent frames, H rows, W columns.
"""

import copy
import logging
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import vae_chunks, vae_fused
from engine.config import VAEConfig
from engine.vae_blocks import (
    AttentionBlock,
    CausalConv3d,
    ChannelNorm,
    Downsample,
    ResidualBlock,
    Space,
    Stream,
    Upsample,
    WholeFrame,
    run,
    stream_conv,
)
from engine.vae_graph import Recordings
from engine.vae_stages import DownStage, UpStage

log = logging.getLogger(__name__)


def middle(dim: int) -> nn.ModuleList:
    """The layers between encoder and decoder halves: block, attention, block."""
    return nn.ModuleList((ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)))


def final(dim: int, out_dim: int) -> nn.ModuleDict:
    """The last norm and convolution, by the official Sequential's indices (1 is SiLU)."""
    return nn.ModuleDict({"0": ChannelNorm(dim, 3), "2": CausalConv3d(dim, out_dim, 3)})


class Encoder(nn.Module):
    """Pixels to twice the latent channels (mean and log-variance)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3 if config.kind == "2.1" else 12, dims[0], 3)
        layers: list[nn.Module] = []
        for i, (in_dim, out_dim) in enumerate(pairwise(dims)):
            last = i == len(config.dim_mult) - 1
            temporal = not last and config.temporal_downsample[i]
            if config.kind == "2.2":
                layers.append(DownStage(in_dim, out_dim, config.num_res_blocks, temporal, last))
                continue
            for j in range(config.num_res_blocks):
                layers.append(ResidualBlock(in_dim if j == 0 else out_dim, out_dim))
            if not last:
                layers.append(Downsample(out_dim, temporal))
        self.downsamples = nn.ModuleList(layers)
        self.middle = middle(dims[-1])
        self.head = final(dims[-1], 2 * config.z_dim)

    def stream(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        """The next chunk of frames (1, then 4 each) as one latent frame's channels."""
        x = self.conv1.stream(x_BCTHW, stream)
        x = run((*self.downsamples, *self.middle), x, stream)
        return stream_conv(self.head["2"], F.silu(self.head["0"](x)), stream)


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        multipliers = config.dim_mult[::-1]
        dims = [config.decoder_base_dim * m for m in (multipliers[0], *multipliers)]
        upsample_time = config.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(config.z_dim, dims[0], 3)
        self.middle = middle(dims[0])
        layers: list[nn.Module] = []
        for i, (in_dim, out_dim) in enumerate(pairwise(dims)):
            last = i == len(multipliers) - 1
            temporal = not last and upsample_time[i]
            if config.kind == "2.2":
                layers.append(UpStage(in_dim, out_dim, config.num_res_blocks + 1, temporal, last))
                continue
            halved = in_dim if i == 0 else in_dim // 2  # the upsample before it halved the channels
            for j in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(halved if j == 0 else out_dim, out_dim))
            if not last:
                layers.append(Upsample(out_dim, out_dim // 2, temporal))
        self.upsamples = nn.ModuleList(layers)
        self.head = final(dims[-1], 3 if config.kind == "2.1" else 12)

    def stream(self, z_BCFHW: Tensor, stream: Stream) -> Tensor:
        """The next latent frame as 1 (the first) or 4 frames."""
        x = self.conv1.stream(z_BCFHW, stream)
        x = run((*self.middle, *self.upsamples), x, stream)
        return stream_conv(self.head["2"], F.silu(self.head["0"](x)), stream)


def fold_pixels(x_B3THW: Tensor) -> Tensor:
    """2x2 pixels into channels, the column's sub-pixel before the row's: [B, 12, T, H/2, W/2]."""
    b, c, t, h, w = x_B3THW.shape
    x = x_B3THW.reshape(b, c, t, h // 2, 2, w // 2, 2)
    return x.permute(0, 1, 6, 4, 2, 3, 5).reshape(b, 4 * c, t, h // 2, w // 2)


def unfold_pixels(x_BCTHW: Tensor) -> Tensor:
    """The inverse of `fold_pixels`: [B, 3, T, 2H, 2W]."""
    b, c, t, h, w = x_BCTHW.shape
    x = x_BCTHW.reshape(b, c // 4, 2, 2, t, h, w)
    return x.permute(0, 1, 4, 5, 3, 6, 2).reshape(b, c // 4, t, 2 * h, 2 * w)


class VAE(nn.Module):
    """Encoder and decoder with the official checkpoint's parameter names."""

    recordings: Recordings | None = None  # replay chunks as CUDA graphs where the decoder is fused

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def encode_moments(self, video_B3THW: Tensor, space: Space | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, [B, C, F, H/s, W/s] each, not normalised; T is 4n+1, values in [-1, 1].

        `space` tells how the frames are spread over ranks: each passes and receives the whole.
        """
        frames = video_B3THW.shape[2]
        step = self.config.stride[0]
        if frames % step != 1:
            raise ValueError(f"a video of {frames} frames can't be encoded: it takes {step}n+1 frames")
        stream, chunks = Stream(space), []
        part_B3THW = stream.space.cut(video_B3THW, self.config.stride[1])
        x = fold_pixels(part_B3THW) if self.config.kind == "2.2" else part_B3THW
        for chunk in torch.split(x, [1] + [step] * (frames // step), dim=2):
            chunks.append(self.encoder.stream(chunk, stream))
            stream.first = False
        moments = stream.space.gather(self.conv1(torch.cat(chunks, dim=2)))
        narrow = moments.dtype == torch.float16 and not moments.is_meta
        if narrow and not moments.isfinite().all():  # the whole frame's, so all ranks find the same
            log.warning("an image left fp16's range in the VAE's encoder: encoded again in bfloat16")
            wide = copy.deepcopy(self).bfloat16()
            return wide.encode_moments(video_B3THW.bfloat16(), space)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance

    def encode(self, video_B3THW: Tensor, space: Space | None = None) -> Tensor:
        """Normalised latents [B, C, F, H/s, W/s]: the mean of the posterior."""
        mean, _ = self.encode_moments(video_B3THW, space)
        return (mean - self._channels(self.config.latent_mean, mean)) / self._channels(
            self.config.latent_std, mean
        )

    def decode_chunks(self, latents_BCFHW: Tensor, space: Space | None = None) -> Iterator[Tensor]:
        """The video of normalised latents as it comes: [B, 3, 1, H, W], then [B, 3, 4, H, W] each.

        `space` tells how the frames are spread over ranks: each passes the whole and receives its part.
        Values are about [-1, 1] and not clamped (training needs the gradient).
        """
        config, space = self.config, space or WholeFrame()
        latents_BCFHW = space.cut(latents_BCFHW)
        z = latents_BCFHW * self._channels(config.latent_std, latents_BCFHW)
        z = self.conv2(z + self._channels(config.latent_mean, latents_BCFHW))
        if vae_fused.applies(self.conv2.weight):
            chunks = vae_chunks.decode(self.decoder, z, space, self.recordings)
        else:
            chunks = self._plain_chunks(self.decoder, z, space)
        for frames in chunks:
            yield unfold_pixels(frames) if config.kind == "2.2" else frames

    @staticmethod
    def _plain_chunks(decoder: Decoder, z_BCFHW: Tensor, space: Space) -> Iterator[Tensor]:
        """The decoder as the maths reads, latent frame by latent frame."""
        stream = Stream(space)
        for latent in torch.split(z_BCFHW, 1, dim=2):
            yield decoder.stream(latent, stream)
            stream.first = False

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """The whole video, [B, 3, 4F-3, H*s, W*s], not clamped."""
        return torch.cat(list(self.decode_chunks(latents_BCFHW)), dim=2)

    @staticmethod
    def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
        """Per-channel values, shaped to broadcast over [B, C, F, H, W]."""
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)
