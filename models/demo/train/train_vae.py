"""Trains the demo model's causal 3-D VAE: reconstruction and a KL term.

    python -m models.demo.train.train_vae

Most steps see small crops of nine frames, which is what makes many steps affordable; every fourth sees
whole clips. The latents' mean and deviation are measured at the end and written to reel.json.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.vae import VAE
from engine.vae_blocks import ChannelNorm, Stream
from models.demo.train.common import (
    SEED,
    VAE_CONFIG,
    Budget,
    Log,
    arguments,
    psnr,
    to_bf16,
    update_reel_json,
)
from models.demo.train.render import PackedScenes, pack, render
from models.demo.train.world import sample_scenes

KL_WEIGHT = 5e-5
STD_FLOOR = 0.25  # of the largest channel's: channels that carry nothing must not be blown up to noise
CHECKPOINT = "Wan2.1_VAE.pth"


def lay_out(x: Tensor) -> Tensor:
    """On a GPU the layout that tensor cores like, channels innermost; nothing changes on a CPU."""
    if not x.is_cuda:
        return x
    return x.contiguous(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)


class LongStream(Stream):
    """Memory for two long chunks, in the GPU's layout."""

    def remember(self, layer: nn.Module, x_BCTHW: Tensor, frames: int) -> Tensor:
        """As Stream.remember."""
        past = self.past.get(layer)
        x = F.pad(x_BCTHW, (0, 0, 0, 0, frames, 0)) if past is None else torch.cat((past, x_BCTHW), dim=2)
        x = lay_out(x)
        self.past[layer] = x[:, :, -frames:]
        return x


def encode(vae: VAE, video_B3THW: Tensor) -> tuple[Tensor, Tensor]:
    """`vae.encode_moments` in two chunks, the first frame and all the others: the same, in fewer launches."""
    stream, chunks = LongStream(), []
    for chunk in video_B3THW.split([1, video_B3THW.shape[2] - 1], dim=2):
        chunks.append(vae.encoder.stream(lay_out(chunk), stream))
        stream.first = False
    mean, log_variance = vae.conv1(torch.cat(chunks, dim=2)).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: VAE, z_BCFHW: Tensor) -> Tensor:
    """The decoder on latents that are not normalised, in two chunks likewise."""
    z = vae.conv2(z_BCFHW)
    stream, chunks = LongStream(), []
    for chunk in z.split([1, z.shape[2] - 1], dim=2):
        chunks.append(vae.decoder.stream(lay_out(chunk), stream))
        stream.first = False
    return torch.cat(chunks, dim=2).float()


def load_vae(folder: Path, device: str) -> VAE:
    """The saved VAE in fp32, latents not normalised."""
    vae = VAE(VAE_CONFIG)
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    vae.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return to_device(vae, device)


def to_device(vae: VAE, device: str) -> VAE:
    """Move, with the convolutions' weights in the GPU's layout."""
    vae = vae.to(device)
    for parameter in vae.parameters():
        if parameter.dim() >= 4:
            parameter.data = lay_out(parameter.data)
    return vae


def draw_batch(packed: PackedScenes, step: int, size: int, generator: torch.Generator) -> Tensor:
    """Whole clips on every fourth step, else nine frames of a 64x64 window, for about the same work."""

    def number(top: int) -> int:
        return int(torch.randint(top, (), generator=generator).item())

    whole = step % 4 == 3
    rows = torch.randint(len(packed), (max(size // 8, 1) if whole else size,), generator=generator)
    chosen = packed[rows.to(packed.spec.device)]
    if whole:
        return render(chosen)
    return render(chosen, window=(number(65), number(65), 64, 64), span=(number(9), 9))


def losses(vae: VAE, video: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Absolute and squared error, edges, and the divergence from N(0, 1) of the posterior."""
    mean, log_variance = encode(vae, video)
    noise = torch.randn(mean.shape, device=mean.device, generator=generator)
    output = decode(vae, mean + noise * torch.exp(0.5 * log_variance))
    error = output - video
    absolute, square = error.abs().mean(), error.square().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    total = absolute + 2 * square + 0.5 * edges + KL_WEIGHT * kl
    return total, {"absolute": absolute, "square": square, "kl": kl}


@torch.no_grad()
def measure(vae: VAE, device: str, count: int, size: int = 128, frames: int = 17) -> float:
    """Mean PSNR in dB over held-out clips, through the latents' mean."""
    packed = pack(sample_scenes(count, SEED + 3, "held_out")).to(device)
    values = []
    for i in range(0, count, 16):
        video = render(packed[i : i + 16], frames, size, size)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            values.append(psnr(decode(vae, encode(vae, video)[0]), video))
    return float(torch.cat(values).mean())


@torch.no_grad()
def latent_statistics(vae: VAE, packed: PackedScenes, device: str) -> tuple[list[float], list[float]]:
    """Per-channel mean and (floored) deviation over training clips."""
    parts = []
    for i in range(0, len(packed), 16):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            parts.append(encode(vae, render(packed[i : i + 16]))[0].transpose(0, 1).flatten(1))
    values = torch.cat(parts, dim=1)
    std = values.std(dim=1)
    print("vae: latent deviations", [round(float(s), 3) for s in std], flush=True)
    std = std.clamp_min(float(std.max()) * STD_FLOOR)
    return [round(float(x), 5) for x in values.mean(dim=1)], [round(float(x), 5) for x in std]


def main() -> None:
    """Train, measure, save."""
    parser = arguments(__doc__ or "", seconds=150)
    parser.add_argument("--no-compile", action="store_true", help="don't compile the norms")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    vae = load_vae(args.out, args.device) if args.resume else to_device(VAE(VAE_CONFIG), args.device)
    if args.device == "cuda" and not args.no_compile:
        torch._dynamo.config.cache_size_limit = 64
        ChannelNorm.forward = torch.compile(ChannelNorm.forward, dynamic=True)  # type: ignore[method-assign]
    tiny = args.max_steps < 1000
    packed = pack(sample_scenes(64 if tiny else 40_000, SEED + 4)).to(args.device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.99), fused=args.device == "cuda"
    )
    budget = Budget(optimizer, args.lr or 1.5e-3, args.seconds, args.max_steps)
    log = Log("vae", args.out, every=min(100, args.max_steps))
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.Generator(args.device).manual_seed(SEED)
    for step in budget.steps():
        video = draw_batch(packed, step, args.batch or 96, generator)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss, parts = losses(vae, video, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        log.add(step, **parts)
    torch.save(to_bf16(vae), args.out / CHECKPOINT)
    vae = load_vae(args.out, args.device)  # as shipped
    mean, std = latent_statistics(vae, packed[: 32 if tiny else 1024], args.device)
    update_reel_json(args.out, latent_mean=mean, latent_std=std)
    value = measure(vae, args.device, 16 if tiny else 256)
    print(f"vae: {value:.2f} dB on held-out clips", flush=True)
    log.save(held_out_psnr_db=value)


if __name__ == "__main__":
    main()
