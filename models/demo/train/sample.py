"""Generates many clips at once with the engine's modules, to see how training goes.

    python -m models.demo.train.sample --count 512 --guide 3 --shift 5 --sheet out.png

The figures of record come from `benchmarks/quality.py`, which calls the engine's own pipeline.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from engine.config import Solver
from engine.dit import DiT
from engine.sampler import TRAIN_TIMESTEPS, make_schedule, make_solver
from engine.vae import VAE
from models.demo.train import fast_vae
from models.demo.train.captions import held_out_prompts
from models.demo.train.classifier import CHECKPOINT as CLASSIFIER
from models.demo.train.classifier import load_classifier
from models.demo.train.common import DIT, MODEL_DIR, load_weights
from models.demo.train.fast_render import render
from models.demo.train.judge import Tally, add, judge, shares
from models.demo.train.render import pack
from models.demo.train.train_text import embed, load_encoder, tokenize
from models.demo.train.train_vae import decode, encode, load_vae
from models.demo.train.world import Scene

STEPS = 20


def load_expert(folder: Path, which: str, device: str) -> DiT:
    """One saved expert in fp32; which is 'high' or 'low'."""
    model = DiT(DIT)
    load_weights(model, folder / f"{which}_noise_model" / "diffusion_pytorch_model.safetensors")
    return model.to(device)


def seeded_noise(seeds: list[int], frames: int, side: int) -> Tensor:
    """The pipeline's starting noise for each seed, [B, 16, F, H, W]."""
    shape = (DIT.in_channels, (frames - 1) // 4 + 1, side // 8, side // 8)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def denoise(
    high: DiT,
    low: DiT,
    text_BTE: Tensor,
    empty_TE: Tensor,
    noise: Tensor,
    *,
    shift: float,
    guide: tuple[float, float],
    boundary: float,
    steps: int = STEPS,
    solver: Solver = "unipc",
) -> Tensor:
    """The pipeline's loop over a batch: latents [B, C, F, H, W]."""
    device = noise.device
    schedule = make_schedule(solver, steps, shift)
    run = make_solver(solver, schedule)
    both = torch.cat((text_BTE, empty_TE[None].expand_as(text_BTE)))
    texts: dict[int, list[tuple[Tensor, Tensor]]] = {}
    latents = noise
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for t in schedule.timesteps.tolist():
            is_high = t >= boundary * TRAIN_TIMESTEPS
            expert, scale = (high, guide[1]) if is_high else (low, guide[0])
            if id(expert) not in texts:
                texts[id(expert)] = expert.encode_text(both)
            time = torch.full((1, 1), float(t), device=device)
            flow = expert(torch.cat((latents, latents)), time, texts[id(expert)]).float()
            cond, uncond = flow.chunk(2)
            latents = run.step(uncond + scale * (cond - uncond), latents)
    return latents


class Sampler:
    """Everything needed to generate and judge, loaded once."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device = device
        facts = json.loads((folder / "reel.json").read_text())
        self.facts = facts
        self.encoder, self.tokenizer = load_encoder(folder, device)
        self.vae: VAE = load_vae(folder, device)
        self.mean = torch.tensor(facts["latent_mean"], device=device).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(facts["latent_std"], device=device).view(1, -1, 1, 1, 1)
        judged = (folder / CLASSIFIER).exists()
        self.classifier = load_classifier(folder, device) if judged else None

    def embed_raw(self, texts: list[str]) -> Tensor:
        """Embeddings [B, T, E] in bf16."""
        return self.embed_ids(tokenize(self.tokenizer, texts))

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids in bf16."""
        return embed(self.encoder, ids.long().to(self.device))

    def embed(self, texts: list[str]) -> Tensor:
        """Embeddings [B, T, E] in fp32."""
        return self.embed_raw(texts).float()

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = 32) -> Tensor:
        """Clips in [-1, 1] of normalised latents."""
        parts = []
        for part in latents.split(chunk):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                parts.append(decode(self.vae, part * self.std + self.mean).clamp(-1, 1))
        return torch.cat(parts)

    def tally(self, video: Tensor, scenes: list[Scene]) -> Tally:
        """What the judge read off these clips."""
        assert self.classifier is not None
        return judge(self.classifier, video, scenes)

    def judge_drawn(self, scenes: list[Scene]) -> dict[str, float]:
        """The judge's reading of drawn clips after a round trip through the VAE."""
        if self.classifier is None:
            return {}
        tallies = []
        for i in range(0, len(scenes), 32):
            video = render(pack(scenes[i : i + 32]).to(self.device))
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"), torch.no_grad():
                video = decode(self.vae, encode(self.vae, video)[0]).clamp(-1, 1)
            tallies.append(self.tally(video, scenes[i : i + 32]))
        return shares(add(tallies))

    def run(
        self,
        high: DiT,
        low: DiT,
        pairs: list[tuple[Scene, str]],
        *,
        shift: float,
        guide: tuple[float, float],
        frames: int = 17,
        side: int = 128,
        steps: int = STEPS,
    ) -> tuple[Tensor, dict[str, float]]:
        """(clips, scores) of captions with seeds 0, 1, 2 ..."""
        clips, tallies = [], []
        empty = self.embed([""])[0]
        for i in range(0, len(pairs), 256):
            some = pairs[i : i + 256]
            noise = seeded_noise(list(range(i, i + len(some))), frames, side).to(self.device)
            latents = denoise(
                high,
                low,
                self.embed([text for _, text in some]),
                empty,
                noise,
                shift=shift,
                guide=guide,
                boundary=self.facts["boundary"],
                steps=steps,
            )
            video = self.decode(latents)
            for j in range(0, len(some) if self.classifier else 0, 64):
                tallies.append(self.tally(video[j : j + 64], [s for s, _ in some[j : j + 64]]))
            clips.append(video[:32].cpu())
        return torch.cat(clips), shares(add(tallies))


def strip_sheet(clips: Tensor, texts: list[str], path: Path, columns: int = 2) -> None:
    """A picture of five frames of each clip under its caption."""
    from PIL import Image, ImageDraw

    side, line = clips.shape[-1], 14
    rows = (len(clips) + columns - 1) // columns
    sheet = Image.new("RGB", (columns * (5 * side + 8), rows * (side + line)), "white")
    pen = ImageDraw.Draw(sheet)
    picks = torch.linspace(0, clips.shape[2] - 1, 5).round().long().tolist()
    for index, (clip, text) in enumerate(zip(clips, texts, strict=True)):
        x, y = (index % columns) * (5 * side + 8), (index // columns) * (side + line)
        pen.text((x + 2, y + 1), text[: 5 * side // 6], fill="black")
        for k, frame in enumerate(picks):
            pixels = ((clip[:, frame] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (x + k * side, y + line))
    sheet.save(path, optimize=True)


def main() -> None:
    """Generate, judge, print, and draw a sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--guide", type=float, nargs="+", default=[3.0])
    parser.add_argument("--shift", type=float, nargs="+", default=[5.0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    fast_vae.speed_up()
    sampler = Sampler(args.model, args.device)
    high, low = (load_expert(args.model, which, args.device).eval() for which in ("high", "low"))
    pairs = [(scene, caption.text) for scene, caption in held_out_prompts(args.count)]
    print("drawn clips after the VAE:", sampler.judge_drawn([scene for scene, _ in pairs]), flush=True)
    for shift in args.shift:
        for guide in args.guide:
            clips, scores = sampler.run(
                high,
                low,
                pairs,
                shift=shift,
                guide=(guide, guide),
                frames=args.frames,
                side=args.side,
                steps=args.steps,
            )
            print(f"shift {shift:g} guide {guide:g} steps {args.steps}:", scores, flush=True)
    if args.sheet:
        count = min(32, len(pairs))
        strip_sheet(clips[:count], [text for _, text in pairs[:count]], args.sheet)


if __name__ == "__main__":
    main()
