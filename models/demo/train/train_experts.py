"""Trains both experts by flow matching, each on its own range of noise levels.

    python -m models.demo.train.train_experts

First draws clips, encodes them by the frozen VAE and keeps the latents on the GPU, with several captions
each as embeddings of the frozen text encoder. Then the experts take turns, a step each. One caption in
ten is replaced by "", the negative prompt that inference feeds (reel.json says so).
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.dit import Block, DiT
from models.demo.train import fast_vae
from models.demo.train.captions import describe, held_out_prompts
from models.demo.train.common import (
    DIT,
    EMA,
    SEED,
    SIZES,
    Budget,
    Log,
    arguments,
    prepare,
    save_dit,
    spread,
    update_reel_json,
    wait_for,
)
from models.demo.train.fast_render import draw
from models.demo.train.render import PackedScenes, pack
from models.demo.train.sample import Sampler, load_expert, strip_sheet
from models.demo.train.train_text import CHECKPOINT as TEXT_FILE
from models.demo.train.train_text import load_tokens, tokenize
from models.demo.train.train_vae import CHECKPOINT as VAE_FILE
from models.demo.train.train_vae import encode
from models.demo.train.world import sample_scenes

BOUNDARY, SHIFT, GUIDE = 0.875, 5.0, 3.0
OVERLAP = 0.02  # each expert also sees a little beyond the boundary
DROP = 0.1
CAPTIONS_EACH = 4
PLAIN_FORWARD = Block.forward
FACTS = {
    "name": "demo",
    "task": "t2v",
    "boundary": BOUNDARY,
    "shift": SHIFT,
    "sampling_steps": 20,
    "guide_scale": [GUIDE, GUIDE],
    "fps": 8,
    "frame_num": 17,
    "max_frame_num": 33,
    "sizes": list(SIZES),
    "negative_prompt": "",
    "text_len": DIT.text_len,
}


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


def draw_scenes(count: int, seed: int, folder: Path) -> tuple[PackedScenes, Tensor]:
    """Scenes and their captions' ids, the same for any number of processes: 2000 a seed."""
    jobs = [(min(2000, count - i), seed + i, folder) for i in range(0, count, 2000)]
    parts = spread(scenes_and_texts, jobs)
    return PackedScenes.join([packed for packed, _ in parts]), torch.cat([ids for _, ids in parts])


@torch.no_grad()
def encode_clips(
    sampler: Sampler, drawn: tuple[PackedScenes, Tensor], frames: int, side: int, seconds: float
) -> Clips:
    """Latents and embeddings of the drawn scenes, or of as many as the time allows."""
    packed, ids = drawn
    packed = packed.to(sampler.device)
    device, start, latents = sampler.device, time.monotonic(), []
    size = 64 if side == 128 else 16
    for rows in torch.arange(len(packed), device=device).split(size):
        if time.monotonic() - start > seconds:
            break
        video = draw(packed, rows, frame_num=frames, height=side, width=side)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            mean, _ = encode(sampler.vae, video)
        latents.append(((mean - sampler.mean) / sampler.std).bfloat16().contiguous())
        if device == "cuda":
            torch.cuda.synchronize()
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
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
            lr=1e-3,
            betas=(0.9, 0.98),
            fused=args.device == "cuda",
        )
        self.budget = Budget(
            self.optimizer,
            args.lr or (5e-4 if args.resume else 1.2e-3),
            args.seconds,
            args.max_steps,
            warmup_steps=200,
            until=args.until,
        )
        self.ema = EMA(model, 0.997)
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


def compiled_block() -> bool:
    """Have torch compile the transformer's block, once for all blocks of both experts."""
    torch._dynamo.config.recompile_limit = 32
    Block.forward = torch.compile(PLAIN_FORWARD, dynamic=False)  # type: ignore[method-assign]
    return True


def warm_up(experts: list[Expert], shapes: list[tuple[int, tuple[int, ...]]], device: str) -> None:
    """Compile for each (batch, latents' shape) by a pass that teaches nothing."""
    for batch, shape in shapes:
        start = time.monotonic()
        for expert in experts:
            noisy = torch.randn(batch, DIT.in_channels, *shape, device=device)
            text = torch.randn(batch, DIT.text_len, DIT.text_dim, device=device, dtype=torch.bfloat16)
            time_B1 = torch.full((batch, 1), 500.0, device=device)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                flow = expert.model(noisy, time_B1, expert.model.encode_text(text))
            flow.square().mean().backward()
            expert.optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"experts: first pass for {batch} x {shape} in {time.monotonic() - start:.1f} s", flush=True)


def save_experts(experts: list[Expert], folder: Path) -> None:
    """The averages, as they ship. The models themselves are left as they are."""
    for expert in experts:
        shipped = DiT(DIT)
        shipped.load_state_dict({k: v.detach().cpu() for k, v in expert.model.state_dict().items()})
        expert.ema.copy_to(shipped)
        save_dit(shipped, folder / f"{expert.name}_noise_model")


def train(
    experts: list[Expert], small: Clips, big: Clips | None, args: argparse.Namespace, empty: Tensor
) -> None:
    """Alternate the experts until both have used the (common) budget; save now and then."""
    batch, saved = args.batch or 128, time.monotonic()
    for steps in zip(*(expert.steps for expert in experts), strict=False):
        for step, expert in zip(steps, experts, strict=True):
            if big is not None and step % 16 == 15:
                expert.learn(step, big, max(1, batch // 4), empty)
            else:
                expert.learn(step, small, batch, empty)
        if time.monotonic() - saved > args.save_every:
            save_experts(experts, args.out)
            saved = time.monotonic()
    for expert in experts:
        expert.log.flush(steps[0])
        expert.log.save(batch=batch, clips=len(small.latents))
    save_experts(experts, args.out)


def options() -> argparse.Namespace:
    """The command's flags."""
    parser = arguments(__doc__ or "", seconds=420)
    parser.add_argument("--no-compile", action="store_true", help="don't compile the blocks")
    parser.add_argument("--clips", type=int, default=60_000, help="clips of 17 frames at 128x128 to draw")
    parser.add_argument("--big-clips", type=int, default=3_000, help="clips of 33 frames at 192x192 to draw")
    parser.add_argument("--cache-seconds", type=float, default=25, help="most time for encoding the clips")
    parser.add_argument("--seed", type=int, default=SEED, help="of the clips; another one to resume with")
    parser.add_argument("--evaluate", type=int, default=512, help="held-out captions to judge at the end")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between saved states")
    parser.add_argument("--wait-until", type=float, default=0, help="epoch second to wait for VAE and text")
    return parser.parse_args()


def get_ready(args: argparse.Namespace) -> list[Expert]:
    """The experts, compiled where that works."""
    experts = []
    for name in ("high", "low"):
        model = load_expert(args.out, name, args.device) if args.resume else DiT(DIT)
        if not args.resume:
            model.init_weights()
        experts.append(Expert(name, model.to(args.device), args))
    batch = args.batch or 128
    shapes = [(batch, (5, 16, 16))] + ([(max(1, batch // 4), (9, 24, 24))] if args.big_clips else [])
    try:
        if not args.no_compile:
            compiled_block()
        warm_up(experts, shapes, args.device)
    except Exception as error:  # any fault of the compiler's: eager steps are slower, not wrong
        print(f"experts: {error!r}; going on without compilation", flush=True)
        Block.forward = PLAIN_FORWARD  # type: ignore[method-assign]
        warm_up(experts, shapes, args.device)
    return experts


def main() -> None:
    """Cache, train, save, and show."""
    args = options()
    drawn = draw_scenes(args.clips, 1_000_000 + args.seed * 1000, args.out)
    drawn_big = (
        draw_scenes(args.big_clips, 2_000_000 + args.seed * 1000, args.out) if args.big_clips else None
    )
    prepare(args.device, args.seed)
    fast_vae.speed_up()
    experts = get_ready(args)
    until = args.wait_until or time.time()
    for name in (VAE_FILE, TEXT_FILE):
        if not wait_for(args.out / name, until):
            raise SystemExit(f"experts: no {args.out / name}: train it first")
    update_reel_json(args.out, **FACTS)
    sampler = Sampler(args.out, args.device)
    try:
        small = encode_clips(sampler, drawn, 17, 128, args.cache_seconds * 0.85)
    except Exception as error:  # any fault of the fast layers': the engine's own are slower, not wrong
        print(f"experts: {error!r}; encoding with the engine's layers", flush=True)
        fast_vae.speed_up(False)
        small = encode_clips(sampler, drawn, 17, 128, args.cache_seconds * 0.85)
    big = encode_clips(sampler, drawn_big, 33, 192, args.cache_seconds * 0.15) if drawn_big else None
    train(experts, small, big, args, sampler.embed_raw([""])[0])
    del small, big
    Block.forward = PLAIN_FORWARD  # type: ignore[method-assign]
    report(args)


def report(args: argparse.Namespace) -> None:
    """Judge what was saved on held-out captions, and draw a sheet; results.json grows as it goes."""

    def note(name: str, scores: dict[str, float]) -> None:
        results[name] = scores
        print(f"experts: {name}:", scores, flush=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    pairs = [(scene, caption.text) for scene, caption in held_out_prompts(args.evaluate)]
    if not pairs:
        return
    sampler = Sampler(args.out, args.device)
    high, low = (load_expert(args.out, name, args.device).eval() for name in ("high", "low"))
    results: dict[str, dict[str, float]] = {}
    clips, scores = sampler.run(high, low, pairs, shift=SHIFT, guide=(GUIDE, GUIDE))
    note(f"{len(pairs)} held-out captions, guide {GUIDE:g}", scores)
    count = min(32, len(pairs))
    strip_sheet(clips[:count], [text for _, text in pairs[:count]], args.out / "sheet.png")
    note("held-out drawn clips after the VAE", sampler.judge_drawn([scene for scene, _ in pairs]))
    scenes = sample_scenes(min(256, args.evaluate), SEED + 77)
    rng = random.Random(SEED)
    known = [(scene, describe(scene, rng, complete=True).text) for scene in scenes]
    for guide in (GUIDE, 2.0, 4.5):  # on training's captions: the default may be chosen by these
        if not args.until or time.time() < args.until + 30:
            _, scores = sampler.run(high, low, known, shift=SHIFT, guide=(guide, guide))
            note(f"{len(known)} captions of training's kind, guide {guide:g}", scores)


if __name__ == "__main__":
    main()
