"""What each rank of a world computes and checks; `tests.engine.worlds` starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine import fused, tiny, vae_fused
from engine.attention import Overlap, sdpa
from engine.cache import StepCache
from engine.conditioning import Conditioning
from engine.config import Canceled, Progress, VAEConfig
from engine.eight_bit_mode import EightBitMode
from engine.errors import CheckpointError
from engine.load import load_pipeline
from engine.parallel.frames import StripedFrame
from engine.parallel.mesh import Mesh
from engine.pipeline import Pipeline
from engine.presets import EightBit, Preset, Reuse
from engine.requests import resolve
from engine.text_encoder import TextEncoder
from engine.tracker import Tracker
from engine.vae import VAE
from engine.vae_blocks import Space, WholeFrame
from kernels import attention_8bit
from kernels.attention.settled import Settled
from kernels.fp8_gemm import Rows
from kernels.fp8_gemm import reference as fp8_reference
from tests.engine.sinks import Frames

LAYOUTS = {2: ("2x1", "1x2"), 4: ("2x2", "1x4"), 8: ("2x4", "1x8")}
# Latent grids whose tokens are: 3 x 3 x 5 = 45, padded; 2 x 2 x 4 = 16, even; 1, fewer than the ranks.
GRIDS = ((3, 6, 10), (2, 4, 8), (1, 2, 2))
FUSED_GRID = GRIDS[0]
# Every transport of a CPU, and every switch of the overlap on and off.
FUSED = {
    f"{transport} {name}": (transport, overlap)
    for transport in ("collective", "shared")
    for name, overlap in {
        "plain": Overlap(split_qkv=False, head_groups=1, interleave=False),
        "split": Overlap(split_qkv=True, head_groups=1, interleave=False),
        "groups": Overlap(split_qkv=False, head_groups=2, interleave=False),
        "interleaved": Overlap(split_qkv=False, head_groups=1, interleave=True),
        "all": Overlap(split_qkv=True, head_groups=2, interleave=True),
    }.items()
}
# Eight ranks take long on few cores: all switches off, and all on.
VARIANTS = {
    world: [name for name in FUSED if world < 8 or name.endswith(("plain", "all"))] for world in LAYOUTS
}
# (kind, latents' rows, columns): cut along columns and along rows, evenly by few worlds only.
IN_HALF = "2.2"  # the kind that also runs in fp16, which takes long on a CPU
VAES = (("2.1", 3, 9), ("2.1", 10, 4), ("2.2", 2, 9))
CHECKS = ("frames", "cancel", "again", "split", "heads", "text", "agree")


def environment() -> dict[str, str]:
    """For processes of ranks: one thread each, loopback."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def grid_name(grid: tuple[int, int, int]) -> str:
    return "x".join(map(str, grid))


def case_latents(pipeline: Pipeline, grid: tuple[int, int, int]) -> Tensor:
    """Three steps over both experts, with unequal guidances, from seeded noise and text."""
    request = resolve(pipeline.spec, "-", sampling_steps=3, shift=3.0, guide_scale=(2.0, 3.0), seed=1)
    generator = torch.Generator().manual_seed(4)
    text = torch.randn(2, 512, pipeline.spec.dit.text_dim, generator=generator)
    noise = torch.randn(16, *grid, generator=generator)
    tracker = Tracker(pipeline.mesh, pipeline.device)
    with pipeline.mesh.working(), torch.inference_mode():
        return pipeline.denoise(request, text, noise, Conditioning((0, 0)), tracker)


@contextmanager
def exact_eights(pipeline: Pipeline) -> Iterator[None]:
    """Every block by the 8-bit path with numbers that aren't rounded: its formulas must be the others'."""

    def unrounded(x: Tensor) -> Rows:
        return Rows(x.float(), x.new_ones(x.shape[:-1], dtype=torch.float32))

    preset = Preset("8bit", "", EightBit(keep_blocks=()))
    with (
        mock.patch.object(fp8_reference, "quantize_rows", unrounded),
        mock.patch.object(attention_8bit, "attention", sdpa),
        pipeline.eight.using(preset),
    ):
        yield


def eight_bit_latents(pipeline: Pipeline) -> Tensor:
    """As `case_latents`, by blocks in 8 bits without their rounding."""
    pipeline.eight = EightBitMode(pipeline, sdpa, sdpa, keep_weights=False)
    with exact_eights(pipeline):
        return case_latents(pipeline, FUSED_GRID)


def cached_latents(pipeline: Pipeline) -> Tensor:
    """Twelve steps of which some are reused, as are some guidances and some self-attention.

    What was done is appended, as numbers.
    """
    rule = Reuse(0.25, attention_threshold=0.5, guidance_threshold=0.6, max_reuse=2, first=1, last=1)
    request = resolve(pipeline.spec, "-", sampling_steps=12, shift=3.0, guide_scale=(2.0, 3.0), seed=1)
    generator = torch.Generator().manual_seed(4)
    text = torch.randn(2, 512, pipeline.spec.dit.text_dim, generator=generator)
    noise = torch.randn(16, *FUSED_GRID, generator=generator)
    tracker, cache = Tracker(pipeline.mesh, pipeline.device), StepCache(pipeline, rule, 12)
    with pipeline.mesh.working(), torch.inference_mode():
        latents = pipeline.denoise(request, text, noise, Conditioning((0, 0)), tracker, cache)
    done = cache.steps_reused, cache.guidance_reused, cache.attention_reused
    return torch.cat((latents.flatten(), torch.tensor([float(count) for count in done])))


def fused_latents(pipeline: Pipeline) -> Tensor:
    """The same by the blocks that GPUs run, whose kernels are torch's on a CPU."""
    with mock.patch.object(fused, "applies", return_value=True):
        return case_latents(pipeline, FUSED_GRID)


def random_vae(kind: str) -> VAE:
    """A small VAE in which every tensor counts."""
    new = kind == "2.2"
    stride = (4, 16, 16) if new else (4, 8, 8)
    vae = VAE(VAEConfig("2.2" if new else "2.1", 8, 8, 4, (0.1,) * 4, (1.2,) * 4, stride=stride))
    tiny.randomize(vae, torch.Generator().manual_seed(5))
    return vae.requires_grad_(False).eval()


def vae_inputs(kind: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(latents of 3 frames, a video of 5)."""
    generator = torch.Generator().manual_seed(6)
    unit = 16 if kind == "2.2" else 8
    latents = torch.randn(1, 4, 3, rows, columns, generator=generator)
    return latents, torch.rand(1, 3, 5, rows * unit, columns * unit, generator=generator) * 2 - 1


def collect_video(vae: VAE, latents: Tensor, space: Space | None = None) -> Tensor:
    """The decoded video on rank 0, something else on the others."""
    space = space or WholeFrame()
    chunks = [space.collect(chunk) for chunk in vae.decode_chunks(latents, space)]
    return torch.cat([chunk for chunk in chunks if chunk is not None] or [latents], dim=2)


def fused_video(vae: VAE, latents: Tensor, space: Space | None = None) -> Tensor:
    """The same by the decoder that GPUs run."""
    with mock.patch.object(vae_fused, "applies", return_value=True):
        return collect_video(vae, latents, space)


def check_frames(pipeline: Pipeline) -> bool:
    """Only rank 0 gets frames and progress."""
    sink, seen = Frames(), list[Progress]()
    request = resolve(pipeline.spec, "a cat", frame_num=5, sampling_steps=1, seed=3)
    result = pipeline.generate(request, sink, on_progress=seen.append)
    if pipeline.mesh.rank:
        return not sink.chunks and not seen
    return result.frames == 5 == len(sink.video) and seen[-1] == Progress("decoding", 2, 2)


def check_cancel(pipeline: Pipeline) -> bool:
    """Rank 0's answer stops all, at the same step; what another rank would say doesn't count."""
    asked = 0

    def should_cancel() -> bool:
        nonlocal asked
        asked += 1
        return pipeline.mesh.rank > 0 or asked > 3

    request = resolve(pipeline.spec, "a cat", frame_num=5, sampling_steps=4, seed=3)
    try:
        pipeline.generate(request, Frames(), should_cancel=should_cancel)
    except Canceled as canceled:
        # encoding 0 and 1, denoising 0, and at denoising 1 the fourth question
        return str(canceled) == "canceled at denoising, step 1 of 4"
    return False


def check_again(pipeline: Pipeline) -> bool:
    """Where one rank's attention made a video's latents NaN, all make them anew, and right."""
    settled, calls = Settled(), 0
    last = pipeline.mesh.rank == pipeline.mesh.size - 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return sdpa(q, k, v) * (float("nan") if last and settled.ask() else 1.0)

    def video() -> Tensor | None:
        sink = Frames()
        pipeline.generate(resolve(pipeline.spec, "a cat", frame_num=5, sampling_steps=1, seed=3), sink)
        return torch.from_numpy(sink.video) if sink.chunks else None

    usual, want = pipeline.sequence, video()
    pipeline.sequence = pipeline.mesh.sequence(attend)
    with mock.patch("engine.pipeline.settled", settled):
        got, twice = video(), calls
        again = video()
    pipeline.sequence = usual
    same = all(one is want is None or torch.equal(one, want) for one in (got, again))
    return same and not settled.allowed and twice == 2 * (calls - twice)


def check_split(pipeline: Pipeline) -> bool:
    """Each rank's tokens among the first 5 of 7 are those that its part of the sequence holds."""
    sequence, world = pipeline.sequence, pipeline.mesh.size
    whole = torch.arange(14.0).view(1, 7, 2)
    part = sequence.shard(whole, 1)
    size = -(-7 // world)
    mine = range(pipeline.mesh.rank * size, pipeline.mesh.rank * size + size)
    return (
        sequence.split(5, 7) == sum(token < 5 for token in mine)
        and part.shape == (1, size, 2)
        and torch.equal(sequence.gather(part, 1, 7), whole)
    )


def check_heads(checkpoint: Path, mesh: Mesh) -> bool:
    """Sequence parts that don't divide the heads are refused at loading."""
    try:
        load_pipeline(checkpoint, mesh=Mesh(mesh.rank, 1, 3), device="cpu")
    except CheckpointError as error:
        return "8 heads, which 3 sequence parts don't divide" in str(error)
    return False


def check_text(pipeline: Pipeline) -> bool:
    """Each prompt is encoded by one rank, and all ranks have what one rank alone would have."""
    request = resolve(pipeline.spec, "a red ball", negative_prompt="a dancer")
    calls: list[str] = []
    encode = TextEncoder.encode
    expected = torch.stack([encode(pipeline.text_encoder, p) for p in ("a red ball", "a dancer")])

    def counted(self: TextEncoder, prompt: str) -> Tensor:
        calls.append(prompt)
        return encode(self, prompt)

    with mock.patch.object(TextEncoder, "encode", counted), torch.inference_mode():
        got = pipeline.encode(request)
    mine = {0: ["a red ball"], pipeline.mesh.size // 2: ["a dancer"]}.get(pipeline.mesh.rank, [])
    return calls == mine and torch.equal(got, expected)


def check_agreement(mesh: Mesh) -> bool:
    """On every rank alike: whether a thing is so on all of them, or on any, and what rank 0 says."""
    last = mesh.rank == mesh.size - 1
    stripes = StripedFrame(None, mesh.size, mesh.size)
    everywhere = [bool(stripes.all_agree(torch.tensor(flag))) for flag in (not last, True)]
    anywhere = [mesh.anyone(flag) for flag in (last, False)]
    first = [mesh.agree(flag) for flag in (last, not last)]
    return everywhere == [False, True] and anywhere == [True, False] and first == [False, True]


def join(folder: Path, name: str, rank: int, world: int, **options: object) -> Mesh:
    """The mesh, met at a file."""
    return Mesh.init(
        backend="gloo",
        init_method=f"file://{folder / name}",
        rank=rank,
        world_size=world,
        **{"timeout_seconds": 60, "transport": "collective", **options},
    )


def run_world(rank: int, world: int, folder: Path, checkpoint: Path) -> None:
    """All that is compared, in both layouts of a world."""
    found: dict[str, Tensor] = {}
    for layout in LAYOUTS[world]:
        guidance, ulysses = map(int, layout.split("x"))
        mesh = join(folder, "meeting", rank, world, guidance=guidance, ulysses=ulysses)
        assert mesh.layout == layout
        pipeline = load_pipeline(checkpoint, mesh=mesh, device="cpu")
        for grid in GRIDS:
            found[f"{layout} {grid_name(grid)}"] = case_latents(pipeline, grid)
        if world == 2:
            found[f"{layout} cached"] = cached_latents(pipeline)
        for name in VARIANTS[world] if ulysses > 1 else ():
            transport, overlap = FUSED[name]
            other = Mesh.init(guidance=guidance, ulysses=ulysses, transport=transport, overlap=overlap)
            pipeline.mesh, pipeline.sequence = other, other.sequence()
            assert ("shared" in name) == ("shared" in other.transport.name)
            found[f"{layout} {name}"] = fused_latents(pipeline)
            if world == 2:
                found[f"{layout} {name} 8bit"] = eight_bit_latents(pipeline)
            if world == 2 and name == "shared all":
                with mock.patch.object(fused, "applies", return_value=True):
                    found[f"{layout} cached in turns"] = cached_latents(pipeline)
            other.watch.close()
        pipeline.mesh, pipeline.sequence = mesh, mesh.sequence()
    for kind, rows, columns in VAES:
        vae, space = random_vae(kind), mesh.space(rows, columns)
        latents, video = vae_inputs(kind, rows, columns)
        with torch.inference_mode():
            name = f"vae {kind} {rows}x{columns}"
            found[f"{name} latents"] = vae.encode(video, space)
            decoded = {"video": collect_video(vae, latents, space)}
            decoded["fused video"] = fused_video(vae, latents, space)
            if kind == IN_HALF:
                decoded["fp16 video"] = fused_video(vae.half(), latents.half(), space)
        if rank == 0:
            found |= {f"{name} {which}": video for which, video in decoded.items()}
    checks = {
        "frames": check_frames(pipeline),
        "cancel": check_cancel(pipeline),
        "again": check_again(pipeline),
        "split": check_split(pipeline),
        "heads": check_heads(checkpoint, mesh),
        "text": check_text(pipeline),
        "agree": check_agreement(mesh),
    }
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "found.safetensors")
    for name, right in checks.items():
        (folder / f"{name}.{rank}").write_text("right" if right else "wrong")
    mesh.close()


def make_checkpoint(folder: Path) -> Path:
    """The tiny checkpoint, with heads for 8 ranks."""
    with mock.patch.object(tiny, "TINY_DIT", replace(tiny.TINY_DIT, dim=128, num_heads=8)):
        return tiny.make_tiny(folder, seed=1)
