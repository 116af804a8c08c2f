"""What the node benchmark runs on: a whole model with random weights on every rank, on one layout at a time.

All ranks call everything together. Layouts share the weights; one layout's windows exist at a time.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from benchmarks._random_model import FULL, TINY, Shape, layout_of, random_pipeline
from engine.attention import pick_attend
from engine.config import GenerationRequest
from engine.ladder import plan_memory
from engine.load import capability
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.presets import Machine, offers
from engine.requests import resolve
from engine.specs import I2V_A14B

TIMEOUT_SECONDS = 300.0  # steps of one GPU are long
SEED = 0
SENTENCE = "A tall ship under full sail rounds the headland at dawn while gulls wheel over the white water. "
CHARACTERS = (512, 32, 128)  # prompts of the seed's benchmark, 32 to 512


def prompt_of(characters: int) -> str:
    """English words of exactly so many characters."""
    return (SENTENCE * (characters // len(SENTENCE) + 1))[: characters - 1].rstrip().ljust(characters, ".")


def rehearsed(model: str) -> Shape:
    """The tiny model at two sizes, one with an odd number of tokens, and 8 heads for as many ranks."""
    shape = TINY["5B" if model == "5B" else "A14B"]
    cell = 32 if model == "5B" else 16
    facts = replace(shape.facts, sizes=((5 * cell, 3 * cell), (cell, 3 * cell)), frame_num=9, max_frame_num=9)
    channels = 36 if model == "I2V" else shape.dit.in_channels
    facts = replace(facts, name=I2V_A14B.name, task=I2V_A14B.task) if model == "I2V" else facts
    return replace(shape, facts=facts, dit=replace(shape.dit, num_heads=8, dim=128, in_channels=channels))


class Node:
    """A model with random weights on this rank, once it is made, and the layout that it is on now."""

    def __init__(self, model: str, device: torch.device, told: dict[str, Any], tiny: bool) -> None:
        self.device, self.world = device, dist.get_world_size()
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.shape: Shape = rehearsed(model) if tiny else FULL[model]
        self.spec = replace(self.shape.spec, presets=offers(told, Machine(capability(device))))

    def make(self) -> None:
        """The model, on all ranks."""
        vae_dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        mesh = self._join(f"1x{self.world}")
        plan = plan_memory(self.shape.spec, layout_of(self.shape), mesh, self.device, self.dtype, vae_dtype)
        torch.manual_seed(SEED)  # the same weights on all ranks
        made = random_pipeline(self.shape, plan, self.device, self.dtype, vae_dtype, mesh)
        made.spec = self.spec
        self.memory = {"rung": plan.rung, "planned_gib": plan.gib}
        self._room = max(0, plan.available - plan.total)
        made.eight.keep(self._room, self.shape.dit)
        self.pipeline = made

    def _join(self, layout: str) -> Mesh:
        guidance, parts = map(int, layout.split("x"))
        if guidance * parts == 1:
            return Mesh.single()
        return Mesh.init(
            guidance=guidance, ulysses=parts, device=self.device, timeout_seconds=TIMEOUT_SECONDS
        )

    def on(self, layout: str) -> Pipeline:
        """The pipeline on that layout; the last one's windows are given back."""
        old = self.pipeline
        if layout != old.mesh.layout:
            self._leave()
            head = self.shape.dit.head_dim
            attends = (pick_attend(kind, self.dtype, head, self.device) for kind in ("self", "cross"))  # type: ignore[arg-type]
            made = Pipeline(
                old.spec,
                old.text_encoder,
                old.high,
                old.low,
                old.vae,
                self._join(layout),
                self.device,
                *attends,
            )
            made.branches_in_turn = old.branches_in_turn
            # Its kept weights go before the new one's come: it and its pipeline hold each other.
            del old.eight
            made.eight.keep(self._room, self.shape.dit)
            self.pipeline = made
        return self.pipeline

    def _leave(self) -> None:
        mesh = self.pipeline.mesh
        dist.barrier()
        for held in (mesh.transport, mesh.watch):
            if held is not None:
                held.close()

    def close(self) -> None:
        """Give back what the layout holds."""
        self._leave()

    def request(self, size: tuple[int, int] | None, steps: int, seed: int, **more: Any) -> GenerationRequest:
        """A request at the largest size unless given, with a picture where the model wants one."""
        prompt = prompt_of(CHARACTERS[seed % len(CHARACTERS)])
        spec = self.spec
        if spec.task == "i2v":
            more["image"] = picture(size or spec.sizes[0])
        return resolve(spec, prompt, size=size, sampling_steps=steps, seed=seed, **more)


def picture(size: tuple[int, int]) -> Path:
    """A PNG of smooth random colours, the same on every rank and in every run."""
    path = Path(tempfile.gettempdir()) / f"reel-node-{size[0]}x{size[1]}-{dist.get_rank()}.png"
    generator = torch.Generator().manual_seed(SEED)
    small = torch.randint(256, (9, 16, 3), dtype=torch.uint8, generator=generator)
    Image.fromarray(small.numpy()).resize(size, Image.Resampling.BICUBIC).save(path)
    return path
