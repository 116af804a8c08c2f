"""Trains the experts by flow matching, each on its own range of noise levels.

    python -m models.demo.train.train_experts [--experts high low]

First draws clips, encodes them by the frozen VAE and keeps the latents on the GPU, with several captions
each as embeddings of the frozen text encoder. Two experts take turns, a step each; on two GPUs each may
have one to itself. One caption in ten is replaced by "", the negative prompt that inference feeds
(reel.json says so).
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.dit import DiT
from engine.dit_block import Block
from models.demo.train import fast_vae
from models.demo.train.clips import CAPTIONS_EACH, Clips, draw_scenes, encode_clips
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
    update_reel_json,
)
from models.demo.train.graphs import Learn, record
from models.demo.train.sample import Sampler, load_expert

BOUNDARY, SHIFT, GUIDE = 0.875, 5.0, 3.0
OVERLAP = 0.02  # each expert also sees a little beyond the boundary
DROP = 0.1
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


def noise_levels(count: int, high: bool, device: str) -> Tensor:
    """Sigmas of one expert's range, as dense as inference's steps at SHIFT: [count]."""
    top = (BOUNDARY + OVERLAP) if not high else 1.0
    bottom = 0.0 if not high else BOUNDARY - OVERLAP
    low_u, high_u = (sigma / (SHIFT - (SHIFT - 1) * sigma) for sigma in (bottom, top))
    spread = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    u = low_u + (high_u - low_u) * spread
    return SHIFT * u / (1 + (SHIFT - 1) * u)


class Expert:
    """One model in training; on a GPU each size of clips has its step recorded."""

    def __init__(self, name: str, model: DiT, args: argparse.Namespace) -> None:
        self.name, self.model, self.graphs = name, model, args.device == "cuda" and not args.no_graphs
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]

        def rate() -> Tensor | float:
            return torch.tensor(1e-3, device=args.device) if self.graphs else 1e-3

        self.optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": 0.01, "lr": rate()},
                {"params": rest, "weight_decay": 0.0, "lr": rate()},
            ],
            betas=(0.9, 0.98),
            fused=args.device == "cuda",
            capturable=self.graphs,
        )
        self.budget = Budget(
            self.optimizer,
            args.lr or (6e-4 if args.resume else 1.2e-3),
            args.seconds,
            args.max_steps,
            warmup_steps=200,
            until=args.until,
        )
        self.ema = EMA(model, 0.999)
        self.log = Log(name, args.out, every=min(500, args.max_steps), resume=args.resume)
        self.recorded: dict[torch.Size, Learn] = {}

    def prepare(self, clips: Clips, batch: int, empty_TE: Tensor) -> None:
        """Compile and record the step for clips of this size."""

        def learn() -> dict[str, Tensor]:
            return self._learn(clips, batch, empty_TE)

        start = time.monotonic()
        self.recorded[clips.latents.shape] = record(learn, self.optimizer) if self.graphs else learn
        print(f"{self.name}: step of {batch} ready in {time.monotonic() - start:.1f} s", flush=True)

    def learn(self, step: int, clips: Clips) -> None:
        """One step of flow matching on clips that were prepared for."""
        losses = self.recorded[clips.latents.shape]()
        self.ema.update(step)
        self.log.add(step, **losses)

    def _learn(self, clips: Clips, batch: int, empty_TE: Tensor) -> dict[str, Tensor]:
        """Predict noise minus video at random noise levels."""
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
        self.optimizer.zero_grad(set_to_none=True)
        on = device.type == "cuda"
        with torch.autocast(device.type, torch.bfloat16, enabled=on, cache_enabled=False):
            flow = self.model(noisy, 1000 * sigma[:, None], self.model.encode_text(text))
            loss = (flow.float() - (noise - video)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": loss.detach()}


def compile_blocks() -> None:
    """Have torch compile the transformer's block, once for all blocks of both experts."""
    torch._dynamo.config.recompile_limit = 32
    Block.forward = torch.compile(PLAIN_FORWARD, dynamic=False)  # type: ignore[method-assign]


def save_experts(experts: list[Expert], folder: Path) -> None:
    """The averages, as they ship. The models themselves are left as they are."""
    for expert in experts:
        shipped = DiT(DIT)
        shipped.load_state_dict({k: v.detach().cpu() for k, v in expert.model.state_dict().items()})
        expert.ema.copy_to(shipped)
        save_dit(shipped, folder / f"{expert.name}_noise_model")


def train(experts: list[Expert], small: Clips, big: Clips | None, args: argparse.Namespace) -> None:
    """Take turns until the (common) budget is used; save now and then."""
    saved = time.monotonic()
    step = 0
    for steps in zip(*(expert.budget.steps() for expert in experts), strict=False):
        step = steps[0]
        for expert in experts:
            expert.learn(step, big if big is not None and step % 16 == 15 else small)
        if step % 10 == 9 and args.device == "cuda":
            torch.cuda.synchronize()  # or recorded steps queue up for seconds, and the clock knows nothing
        if time.monotonic() - saved > args.save_every:
            save_experts(experts, args.out)
            saved = time.monotonic()
    save_experts(experts, args.out)
    for expert in experts:
        expert.log.flush(step)
        expert.log.save(batch=args.batch, clips=len(small.latents))


def options() -> argparse.Namespace:
    """The command's flags."""
    parser = arguments(__doc__ or "", seconds=420)
    parser.add_argument("--experts", nargs="+", choices=("high", "low"), default=["high", "low"])
    parser.add_argument("--no-compile", action="store_true", help="don't compile the blocks")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel of every step")
    parser.add_argument("--clips", type=int, default=60_000, help="clips of 17 frames at 128x128 to draw")
    parser.add_argument("--big-clips", type=int, default=3_000, help="clips of 33 frames at 192x192 to draw")
    parser.add_argument("--cache-seconds", type=float, default=40, help="most time for encoding the clips")
    parser.add_argument("--seed", type=int, default=SEED, help="of the clips; another one to resume with")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between saved states")
    args = parser.parse_args()
    args.batch = args.batch or 128
    return args


def cached_clips(args: argparse.Namespace) -> tuple[Clips, Clips | None, Tensor]:
    """(clips at 17 x 128 x 128, clips at 33 x 192 x 192 if asked for, the empty prompt's embedding)."""
    drawn = draw_scenes(args.clips, 1_000_000 + args.seed * 1000, args.out)
    more = draw_scenes(args.big_clips, 2_000_000 + args.seed * 1000, args.out) if args.big_clips else None
    prepare(args.device, args.seed)
    sampler = Sampler(args.out, args.device)
    small = encode_clips(sampler, drawn, 17, 128, args.cache_seconds * 0.8)
    big = encode_clips(sampler, more, 33, 192, args.cache_seconds * 0.2) if more else None
    return small, big, sampler.embed_raw([""])[0]


def main() -> None:
    """Cache, train, save."""
    args = options()
    fast_vae.speed_up()
    small, big, empty = cached_clips(args)
    update_reel_json(args.out, **FACTS)
    if not args.no_compile:
        compile_blocks()
    experts = []
    for name in args.experts:
        model = load_expert(args.out, name, args.device) if args.resume else DiT(DIT)
        if not args.resume:
            model.init_weights()
        expert = Expert(name, model.to(args.device), args)
        expert.prepare(small, args.batch, empty)
        if big is not None:
            expert.prepare(big, max(1, args.batch // 4), empty)
        experts.append(expert)
    train(experts, small, big, args)


if __name__ == "__main__":
    main()
