"""Trains the demo model's causal 3-D VAE: reconstruction and a KL term.

    python -m models.demo.train.train_vae

The first steps see small crops of nine frames, the last ones whole clips. The latents' mean and deviation
are measured at the end and written to reel.json.
"""

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.vae import VAE
from engine.vae_blocks import Stream
from models.demo.train import fast_vae
from models.demo.train.common import (
    SEED,
    VAE_CONFIG,
    Budget,
    Log,
    arguments,
    prepare,
    psnr,
    replace_file,
    to_bf16,
    update_reel_json,
)
from models.demo.train.fast_render import draw, render
from models.demo.train.graphs import Learn, record
from models.demo.train.render import PackedScenes, pack
from models.demo.train.world import sample_scenes

KL_WEIGHT = 2e-5
SQUARE_WEIGHT = 4.0  # of the squared error, beside the absolute one
STD_FLOOR = 0.25  # of the largest channel's: channels that carry nothing must not be blown up to noise
CHECKPOINT = "Wan2.1_VAE.pth"
WHOLE_FROM = 0.75  # share of the budget after which whole clips are shown


def lay_out(x: Tensor) -> Tensor:
    """On a GPU the layout that tensor cores like, channels innermost; nothing changes on a CPU."""
    if not x.is_cuda:
        return x
    return x.contiguous(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)


def encode(vae: VAE, video_B3THW: Tensor) -> tuple[Tensor, Tensor]:
    """`vae.encode_moments`; with the fast layers the whole video goes through at once."""
    if not fast_vae.is_on():
        mean, log_variance = vae.encode_moments(video_B3THW)
        return mean.float(), log_variance.float().clamp(-30, 20)
    moments = vae.conv1(vae.encoder.stream(lay_out(video_B3THW), Stream()))
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: VAE, z_BCFHW: Tensor) -> Tensor:
    """The decoder on latents that are not normalised, likewise."""
    if not fast_vae.is_on():
        return vae.decode(z_BCFHW).float()
    return vae.decoder.stream(lay_out(vae.conv2(z_BCFHW)), Stream()).float()


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


def draw_batch(packed: PackedScenes, size: int, whole: bool) -> Tensor:
    """`size` crops of nine frames and 64x64 pixels of either size, or whole clips for about the same work."""
    device = packed.spec.device
    count = max(size // 8, 1) if whole else size
    rows = torch.randint(len(packed), (count,), device=device)
    if whole:
        return draw(packed, rows)
    frames, side = (33, 192) if random.random() < 0.25 else (17, 128)
    first = torch.randint(frames - 8, (count, 1), device=device)
    corners = torch.cat((first, torch.randint(side - 63, (count, 2), device=device)), dim=1)
    return draw(packed, rows, corners, (9, 64, 64), frame_num=frames, height=side, width=side)


def losses(vae: VAE, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Absolute and squared error, edges, and the divergence from N(0, 1) of the posterior."""
    mean, log_variance = encode(vae, video)
    output = decode(vae, mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance))
    error = output - video
    absolute, square = error.abs().mean(), error.square().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    total = absolute + SQUARE_WEIGHT * square + 0.5 * edges + KL_WEIGHT * kl
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


class Trainer:
    """One step after another; on a GPU each shape of video is recorded once as a CUDA graph and replayed."""

    def __init__(self, vae: VAE, device: str, graphs: bool, decoder_only: bool) -> None:
        self.vae, self.device, self.graphs = vae, device, graphs
        if decoder_only:  # the experts' latents stay what they are
            for part in (vae.encoder, vae.conv1):
                part.requires_grad_(False)
        self.parameters = [p for p in vae.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=torch.tensor(1e-3, device=device) if graphs else 1e-3,
            weight_decay=1e-4,
            betas=(0.9, 0.99),
            fused=device == "cuda",
            capturable=graphs,
        )
        self.recorded: dict[torch.Size, tuple[Tensor, Learn]] = {}

    def __call__(self, video: Tensor) -> dict[str, Tensor]:
        """Learn from a batch; its losses."""
        if not self.graphs:
            return self._learn(video)
        if video.shape not in self.recorded:
            place = video.clone()
            self.recorded[video.shape] = place, record(lambda: self._learn(place), self.optimizer)
        place, replay = self.recorded[video.shape]
        place.copy_(video)
        return replay()

    def _learn(self, video: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        on = self.device == "cuda"
        with torch.autocast(self.device, torch.bfloat16, enabled=on, cache_enabled=False):
            loss, parts = losses(self.vae, video)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return {name: value.detach() for name, value in parts.items()}


def save(vae: VAE, folder: Path) -> None:
    """The VAE as it ships."""
    replace_file(folder / CHECKPOINT, lambda draft: torch.save(to_bf16(vae), draft))


def main() -> None:
    """Train, measure, save."""
    parser = arguments(__doc__ or "", seconds=150)
    parser.add_argument(
        "--mode",
        choices=("graph", "eager", "plain"),
        default="graph",
        help="CUDA graphs and fast layers, the fast layers alone, or the engine's own",
    )
    parser.add_argument("--decoder-only", action="store_true", help="with --resume: keep the latents")
    args = parser.parse_args()
    prepare(args.device)
    fast_vae.speed_up(args.mode != "plain")
    vae = load_vae(args.out, args.device) if args.resume else to_device(VAE(VAE_CONFIG), args.device)
    tiny = args.max_steps < 1000
    packed = pack(sample_scenes(16 if tiny else 12_000, SEED + 4)).to(args.device)
    trainer = Trainer(vae, args.device, args.mode == "graph" and args.device == "cuda", args.decoder_only)
    rate = args.lr or (5e-4 if args.resume else 1e-3)
    budget = Budget(trainer.optimizer, rate, args.seconds, args.max_steps, until=args.until)
    log = Log("vae", args.out, every=min(100, args.max_steps), resume=args.resume)
    for step in budget.steps():
        log.add(step, **trainer(draw_batch(packed, args.batch or 24, budget.done > WHOLE_FROM)))
        if step % 10 == 9 and args.device == "cuda":
            torch.cuda.synchronize()  # or recorded steps queue up for seconds, and the clock knows nothing
    log.flush(step)
    publish(vae, args, packed[: 4 if tiny else 768], log, tiny)


def publish(vae: VAE, args: argparse.Namespace, packed: PackedScenes, log: Log, tiny: bool) -> None:
    """Save the weights with the statistics of their latents, and measure."""
    draft = args.out / "vae-draft"
    draft.mkdir(exist_ok=True)
    save(vae, draft)
    vae = load_vae(draft, args.device)  # as shipped
    if not args.decoder_only:
        mean, std = latent_statistics(vae, packed, args.device)
        update_reel_json(args.out, latent_mean=mean, latent_std=std)
    (draft / CHECKPOINT).replace(args.out / CHECKPOINT)  # last: who waits for it finds the rest
    draft.rmdir()
    value = measure(vae, args.device, 2 if tiny else 128)
    print(f"vae: {value:.2f} dB on held-out clips", flush=True)
    log.save(held_out_psnr_db=value)


if __name__ == "__main__":
    main()
