"""What the experts learn from: drawn clips as latents of the frozen VAE, captions as embeddings."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.demo.train.captions import describe
from models.demo.train.common import spread
from models.demo.train.fast_render import draw
from models.demo.train.render import PackedScenes, pack
from models.demo.train.sample import Sampler
from models.demo.train.train_text import load_tokens, tokenize
from models.demo.train.train_vae import encode
from models.demo.train.world import sample_scenes

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
