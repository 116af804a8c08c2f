"""Trains both experts by flow matching, each on its own range of noise levels.

    python -m models.demo.train.train_experts

First draws clips, encodes them by the frozen VAE and keeps the latents on the GPU, with several captions
each as embeddings of the frozen text encoder. Then the experts take turns, a step each. One caption in
ten is replaced by "", the negative prompt that inference feeds (reel.json says so).
"""

import argparse
import multiprocessing
import random
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.dit import DiT
from models.demo.train.captions import describe, held_out_prompts
from models.demo.train.common import (
    DIT,
    EMA,
    SEED,
    SIZES,
    Budget,
    Log,
    arguments,
    save_dit,
    update_reel_json,
)
from models.demo.train.render import PackedScenes, pack, render
from models.demo.train.sample import Sampler, load_expert, strip_sheet
from models.demo.train.train_text import load_tokens, tokenize
from models.demo.train.train_vae import encode
from models.demo.train.world import sample_scenes

BOUNDARY, SHIFT, GUIDE = 0.875, 5.0, 3.0
OVERLAP = 0.02  # each expert also sees a little beyond the boundary
DROP = 0.1
CAPTIONS_EACH = 4


@dataclass
class Clips:
    """Latents of one size [N, 16, F, H, W] and embeddings [N, CAPTIONS_EACH, T, E], bf16."""

    latents: Tensor
    texts: Tensor


def scenes_and_texts(job: tuple[int, int, Path]) -> tuple[PackedScenes, Tensor]:
    """Training scenes of one seed, with the token ids of CAPTIONS_EACH captions of each."""
    count, seed, folder = job
    scenes = sample_scenes(count, seed)
    rng = random.Random(f"experts-{seed}")
    texts = [describe(scene, rng).text for scene in scenes for _ in range(CAPTIONS_EACH)]
    return pack(scenes), tokenize(load_tokens(folder), texts).short()


def draw_scenes(count: int, seed: int, args: argparse.Namespace) -> tuple[PackedScenes, Tensor]:
    """Scenes and their captions' ids, the same for any number of workers: 500 a seed."""
    jobs = [(min(500, count - i), seed + i, args.out) for i in range(0, count, 500)]
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:
        parts = pool.map(scenes_and_texts, jobs)
    columns = (torch.cat([getattr(p, field.name) for p, _ in parts]) for field in fields(PackedScenes))
    return PackedScenes(*columns), torch.cat([ids for _, ids in parts])


@torch.no_grad()
def encode_clips(
    sampler: Sampler, drawn: tuple[PackedScenes, Tensor], frames: int, side: int, seconds: float
) -> Clips:
    """Latents and embeddings of the drawn scenes, or of as many as the time allows."""
    packed, ids = drawn
    device, start, latents = sampler.device, time.monotonic(), []
    size = 64 if side == 128 else 16
    for i in range(0, len(packed), size):
        if time.monotonic() - start > seconds:
            break
        video = render(packed[i : i + size].to(device), frames, side, side)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            mean, _ = encode(sampler.vae, video)
        latents.append(((mean - sampler.mean) / sampler.std).bfloat16().contiguous())
    stacked = torch.cat(latents)
    embedded = sampler.embed_ids(ids[: len(stacked) * CAPTIONS_EACH])
    print(
        f"{len(stacked)} clips of {frames} frames at {side} in {time.monotonic() - start:.1f} s; "
        f"mean {stacked.float().mean():.3f}, std {stacked.float().std():.3f}",
        flush=True,
    )
    return Clips(stacked, embedded.unflatten(0, (-1, CAPTIONS_EACH)))


def noise_levels(count: int, high: bool, device: str) -> Tensor:
    """Sigmas of one expert's range, as dense as inference's steps at SHIFT: [count]."""
    top = (BOUNDARY + OVERLAP) if not high else 1.0
    bottom = 0.0 if not high else BOUNDARY - OVERLAP
    low_u, high_u = (sigma / (SHIFT - (SHIFT - 1) * sigma) for sigma in (bottom, top))
    spread = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    u = low_u + (high_u - low_u) * spread
    return SHIFT * u / (1 + (SHIFT - 1) * u)


class Expert:
    """One model in training."""

    def __init__(self, name: str, model: DiT, args: argparse.Namespace) -> None:
        self.name, self.model = name, model
        if args.device == "cuda" and not args.no_compile:
            for block in model.blocks:
                block.compile(dynamic=False)
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
            lr=1e-3,
            betas=(0.9, 0.99),
            fused=args.device == "cuda",
        )
        self.budget = Budget(self.optimizer, args.lr or 1e-3, args.seconds, args.max_steps, warmup_steps=200)
        self.ema = EMA(model, 0.999)
        self.log = Log(name, args.out, every=min(200, args.max_steps))
        self.steps = self.budget.steps()

    def learn(self, step: int, clips: Clips, batch: int, empty_TE: Tensor) -> None:
        """One step of flow matching: predict noise minus video at a random noise level."""
        device = clips.latents.device
        rows = torch.randint(len(clips.latents), (batch,), device=device)
        video = clips.latents[rows].float()
        text = clips.texts[rows, torch.randint(CAPTIONS_EACH, (batch,), device=device)]
        dropped = torch.rand(batch, 1, 1, device=device) < DROP
        text = torch.where(dropped, empty_TE, text)
        noise = torch.randn_like(video)
        sigma = noise_levels(batch, self.name == "high", device.type)
        s = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - s) * video + s * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            flow = self.model(noisy, 1000 * sigma[:, None], self.model.encode_text(text))
            loss = (flow.float() - (noise - video)).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(step)
        self.log.add(step, loss=loss)


def train(experts: list[Expert], small: Clips, big: Clips | None, batch: int, empty: Tensor) -> None:
    """Alternate the experts until both have used the (common) budget."""
    for steps in zip(*(expert.steps for expert in experts), strict=False):
        for step, expert in zip(steps, experts, strict=True):
            if big is not None and step % 10 == 9:
                expert.learn(step, big, max(1, batch // 4), empty)
            else:
                expert.learn(step, small, batch, empty)
    for expert in experts:
        expert.ema.copy_to(expert.model)


def main() -> None:
    """Cache, train, save, and show."""
    parser = arguments(__doc__ or "", seconds=420)
    parser.add_argument("--no-compile", action="store_true", help="don't compile the blocks")
    parser.add_argument("--clips", type=int, default=60_000, help="clips of 17 frames at 128x128 to draw")
    parser.add_argument("--big-clips", type=int, default=4_000, help="clips of 33 frames at 192x192 to draw")
    parser.add_argument("--cache-seconds", type=float, default=40, help="most time for encoding either size")
    parser.add_argument("--seed", type=int, default=SEED, help="of the clips; another one to resume with")
    parser.add_argument("--workers", type=int, default=8, help="processes that draw scenes")
    parser.add_argument("--evaluate", type=int, default=512, help="held-out captions to judge at the end")
    args = parser.parse_args()
    drawn = draw_scenes(args.clips, 1_000_000 + args.seed * 1000, args)
    drawn_big = draw_scenes(args.big_clips, 2_000_000 + args.seed * 1000, args)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    update_reel_json(
        args.out,
        name="demo",
        task="t2v",
        boundary=BOUNDARY,
        shift=SHIFT,
        sampling_steps=20,
        guide_scale=[GUIDE, GUIDE],
        fps=8,
        frame_num=17,
        max_frame_num=33,
        sizes=list(SIZES),
        negative_prompt="",
        text_len=DIT.text_len,
    )
    sampler = Sampler(args.out, args.device)
    small = encode_clips(sampler, drawn, 17, 128, args.cache_seconds)
    big = encode_clips(sampler, drawn_big, 33, 192, args.cache_seconds) if args.big_clips else None
    empty = sampler.embed_raw([""])[0]
    experts = []
    for name in ("high", "low"):
        model = load_expert(args.out, name, args.device) if args.resume else DiT(DIT)
        if not args.resume:
            model.init_weights()
        experts.append(Expert(name, model.to(args.device), args))
    train(experts, small, big, args.batch or 256, empty)
    for expert in experts:
        expert.log.flush(-1)
        expert.log.save(batch=args.batch or 256, clips=len(small.latents))
        save_dit(expert.model, args.out / f"{expert.name}_noise_model")
    report(sampler, args)


def report(sampler: Sampler, args: argparse.Namespace) -> None:
    """Judge what was saved on held-out captions, and draw a sheet."""
    high, low = (load_expert(args.out, name, args.device).eval() for name in ("high", "low"))
    pairs = [(scene, caption.text) for scene, caption in held_out_prompts(args.evaluate)]
    if not pairs:
        return
    print("drawn clips after the VAE:", sampler.judge_drawn([scene for scene, _ in pairs]), flush=True)
    clips, scores = sampler.run(high, low, pairs, shift=SHIFT, guide=(GUIDE, GUIDE))
    print("generated:", scores, flush=True)
    count = min(32, len(pairs))
    strip_sheet(clips[:count], [text for _, text in pairs[:count]], args.out / "sheet.png")


if __name__ == "__main__":
    main()
