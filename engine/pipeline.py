"""One video, from request to frames: encode the text, denoise the latents, decode them.

Every rank of the mesh makes the same calls; rank 0 alone writes frames and talks to the callbacks.

Shapes: T text tokens, E text width, C latent channels, F H W latent frames, rows and columns. A leading 2
is (conditional, unconditional).
"""

import logging
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.attention import Attend, sdpa
from engine.cache import StepCache, make_cache
from engine.conditioning import Conditioning, make_conditioning
from engine.config import (
    CancelCheck,
    FrameSink,
    GenerationRequest,
    GenerationResult,
    ModelSpec,
    ProgressCallback,
    Work,
)
from engine.dit import DiT
from engine.dit_block import TextKV
from engine.eight_bit_mode import EightBitMode
from engine.errors import OutOfMemory, RequestError
from engine.frame_writer import FrameWriter
from engine.lora import Loras, distilled
from engine.offload import ExpertExchange, PromptEncoder
from engine.out_of_memory import is_out_of_memory
from engine.parallel.mesh import Mesh
from engine.presets import Preset, find
from engine.requests import check
from engine.sampler import TRAIN_TIMESTEPS, make_schedule, make_solver
from engine.tracker import Tracker
from engine.vae import VAE
from kernels.attention.settled import settled

log = logging.getLogger(__name__)


class Pipeline:
    """A loaded model, warm and ready; `generate` may be called any number of times, one at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        text_encoder: PromptEncoder,
        high: DiT,
        low: DiT | None,
        vae: VAE,
        mesh: Mesh,
        device: torch.device,
        attend: Attend = sdpa,
        cross_attend: Attend | None = None,
    ) -> None:
        self.spec, self.mesh, self.device = spec, mesh, device
        self.text_encoder, self.vae = text_encoder, vae
        self.high = high  # the high-noise expert, or the only one
        self.low = low
        self.sequence = mesh.sequence(attend, cross_attend)
        self.loras: Loras | None = None  # None: no request may name any
        self.no_loras = "there is no LoRA folder"  # why not
        self.exchange: ExpertExchange | None = None  # where one expert is in host memory
        self.eight = EightBitMode(self, attend, cross_attend or attend, keep_weights=False)
        self.branches_in_turn = False  # whether a rank that makes both branches makes them one by one

    def generate(
        self,
        request: GenerationRequest,
        sink: FrameSink,
        *,
        on_progress: ProgressCallback | None = None,
        should_cancel: CancelCheck | None = None,
        latents_out: Path | None = None,
    ) -> GenerationResult:
        """Make the request's video and write its frames to `sink` (on rank 0).

        `latents_out` receives the latents before the VAE as safetensors, key `latents`, [C, F, H, W] fp32.
        Raises RequestError, OutOfMemory, RankLost, and on all ranks at a step boundary Canceled.
        """
        check(request, self.spec)
        tracker = Tracker(self.mesh, self.device, on_progress, should_cancel)
        try:
            with self.mesh.working(), torch.inference_mode():
                with tracker.phase("encoding"):
                    self.use_loras(request)
                    text_2TE = self.encode(request)
                    image = make_conditioning(request, self.spec, self.vae, self.mesh.space)
                preset = self.preset(request)
                with tracker.phase("denoising"), self.eight.using(preset):
                    latents_CFHW, cache = self.latents(request, preset, text_2TE, image, tracker)
                if latents_out is not None and self.mesh.rank == 0:
                    save_file({"latents": latents_CFHW.float().cpu().contiguous()}, latents_out)
                with tracker.phase("decoding"):
                    frames = self.decode(latents_CFHW, sink, tracker)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            raise OutOfMemory(f"{self.device} ran out of memory at {tracker.where}: {error}") from error
        work = cache.work(request.quality) if cache else Work(request.quality, request.sampling_steps)
        return GenerationResult(*image.size, frames, self.spec.fps, request.seed, tracker.seconds, work)

    def preset(self, request: GenerationRequest) -> Preset | None:
        """The preset that a checked request names."""
        return find(self.spec.presets, request.quality)

    def use_loras(self, request: GenerationRequest) -> None:
        """Have the experts carry the request's and its preset's LoRAs and no others."""
        if self.loras is not None:
            self.loras.use(request.loras + distilled(self.preset(request)))
        elif request.loras:
            raise RequestError("loras", [use.name for use in request.loras], f"none: {self.no_loras}")

    def encode(self, request: GenerationRequest) -> Tensor:
        """[2, T, E] embeddings of the prompt and of the negative prompt."""
        prompts = (request.prompt, request.negative_prompt or self.spec.negative_prompt)
        return torch.stack(self.text_encoder.encode_all(prompts, self.mesh))

    def noise(self, request: GenerationRequest, size: tuple[int, int]) -> Tensor:
        """The starting latents [C, F, H, W] fp32, the same for any number of ranks."""
        stride_t, stride_h, stride_w = self.spec.vae.stride
        shape = (
            self.spec.vae.z_dim,
            (request.frame_num - 1) // stride_t + 1,
            size[1] // stride_h,
            size[0] // stride_w,
        )
        generator = torch.Generator(request.noise_device).manual_seed(request.seed)
        noise = torch.randn(shape, generator=generator, device=request.noise_device, dtype=torch.float32)
        return noise.to(self.device)

    def latents(
        self,
        request: GenerationRequest,
        preset: Preset | None,
        text_2TE: Tensor,
        image: Conditioning,
        tracker: Tracker,
    ) -> tuple[Tensor, StepCache | None]:
        """Clean latents [C, F, H, W], and the cache that they were made with.

        Where they aren't finite they are made once more, with attention that can't have them so.
        """
        noise_CFHW = self.noise(request, image.size)
        settled.begin()
        for again in (False, True):
            cache = make_cache(self, preset, request.sampling_steps)
            latents_CFHW = self.denoise(request, text_2TE, noise_CFHW, image, tracker, cache)
            if self.mesh.agree(bool(latents_CFHW.isfinite().all())):
                break
            if again:
                settled.trust()  # they aren't finite without it either
            elif not self.mesh.anyone(settled.suspect):
                break
            else:
                settled.forbid()
                log.warning("the latents aren't finite: denoising again, with the library's softmax")
        return latents_CFHW, cache

    def denoise(
        self,
        request: GenerationRequest,
        text_2TE: Tensor,
        latents_CFHW: Tensor,
        image: Conditioning,
        tracker: Tracker,
        cache: StepCache | None = None,
    ) -> Tensor:
        """From noise to clean latents [C, F, H, W], one solver step after another."""
        schedule = make_schedule(request.solver, request.sampling_steps, request.shift)
        solver = make_solver(request.solver, schedule)
        texts: dict[tuple[int, ...], TextKV] = {}
        latents_CFHW = image.pin(latents_CFHW)
        plan = [self.expert_at(t, request.guide_scale) for t in schedule.timesteps.tolist()]
        expert = None
        for step, (t, (chosen, guide)) in enumerate(zip(schedule.timesteps.tolist(), plan, strict=True)):
            tracker.report("denoising", step, schedule.steps)
            self.eight.at_step(step)
            if chosen is not expert:
                expert, texts = chosen, {}  # the other expert's text keys and values are done with
            if self.exchange is not None:  # after the last step comes the next video's first
                self.exchange.step(chosen, plan[(step + 1) % len(plan)][0], len(self.passes(guide)))
            inputs = (chosen, guide, t, latents_CFHW, text_2TE, texts, image)
            flow_CFHW = self.flow(*inputs) if cache is None else cache.flow(step, *inputs)
            latents_CFHW = image.pin(solver.step(flow_CFHW, latents_CFHW))
        tracker.report("denoising", schedule.steps, schedule.steps)
        return latents_CFHW

    def flow(
        self,
        expert: DiT,
        guide: float,
        t: int,
        latents_CFHW: Tensor,
        text_2TE: Tensor,
        texts: dict[tuple[int, ...], TextKV],
        image: Conditioning,
    ) -> Tensor:
        """The guided flow, uncond + guide * (cond - uncond); guidance 1 needs no unconditional pass.

        `texts` keeps the expert's text keys and values of the rows that this rank evaluates.
        """
        passes = self.passes(guide)
        for rows in passes:
            if rows not in texts:
                texts[rows] = expert.encode_text(text_2TE[list(rows)])
        inputs, timesteps = image.model_input(latents_CFHW)[None], image.timesteps(t, self.device)
        flow = torch.cat([expert(inputs, timesteps, texts[rows], self.sequence) for rows in passes])
        if guide == 1.0:
            return flow[0]
        cond, uncond = flow if self.mesh.guidance == 1 else self.mesh.both_branches(flow)
        guided: Tensor = uncond + guide * (cond - uncond)
        return guided

    def passes(self, guide: float) -> list[tuple[int, ...]]:
        """The forwards of a step, each by its rows of the texts: 0 conditional, 1 unconditional."""
        if guide == 1.0:
            return [(0,)]
        if self.mesh.guidance == 2:
            return [(self.mesh.branch,)]
        return [(0,), (1,)] if self.branches_in_turn else [(0, 1)]

    def expert_at(self, t: int, guide_scale: tuple[float, float]) -> tuple[DiT, float]:
        """The expert for timestep t and its guidance scale; a lone expert uses the first of the pair."""
        if self.low is None or self.spec.boundary is None:
            return self.high, guide_scale[0]
        if t >= self.spec.boundary * TRAIN_TIMESTEPS:
            return self.high, guide_scale[1]
        return self.low, guide_scale[0]

    def decode(self, latents_CFHW: Tensor, sink: FrameSink, tracker: Tracker) -> int:
        """Write the frames to the sink as they come; returns how many there are."""
        latents = latents_CFHW[None].to(next(self.vae.parameters()).dtype)
        chunks, space = latents.shape[2], self.mesh.space(*latents.shape[3:])
        with FrameWriter(sink, self.mesh.beat) as writer:
            for chunk, frames in enumerate(self.vae.decode_chunks(latents, space)):
                tracker.report("decoding", chunk, chunks)
                levels = space.collect(to_uint8(frames[0]))
                if levels is not None and self.mesh.rank == 0:
                    writer.write(levels.permute(1, 2, 3, 0))
            tracker.report("decoding", chunks, chunks)  # the others need not wait for the sink
        return (chunks - 1) * self.spec.vae.stride[0] + 1


def to_uint8(frames_3THW: Tensor) -> Tensor:
    """uint8 RGB levels of frames in [-1, 1] (clamped), rounded to the nearest."""
    return ((frames_3THW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
