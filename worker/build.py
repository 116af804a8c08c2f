"""How a rank gets its pipeline: the engine's own builder, or the one that `Settings.engine` names."""

import logging
import os
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from engine.config import (
    CancelCheck,
    FrameSink,
    GenerationRequest,
    GenerationResult,
    ModelSpec,
    ProgressCallback,
)
from worker.plan import NodePlan
from worker.reports import BadModel

log = logging.getLogger(__name__)


class Ranks(Protocol):
    """How the ranks share the work; `engine.parallel.mesh.Mesh` for one."""

    @property
    def size(self) -> int:
        """How many ranks."""
        ...

    @property
    def guidance(self) -> int:
        """Guidance branches computed side by side."""
        ...

    @property
    def ulysses(self) -> int:
        """Parts of one sequence computed side by side."""
        ...


class RankPipeline(Protocol):
    """What a rank calls; `engine.pipeline.Pipeline` for one."""

    @property
    def spec(self) -> ModelSpec:
        """The model's facts and limits."""
        ...

    @property
    def mesh(self) -> Ranks:
        """The layout."""
        ...

    def generate(
        self,
        request: GenerationRequest,
        sink: FrameSink,
        *,
        on_progress: ProgressCallback | None = None,
        should_cancel: CancelCheck | None = None,
    ) -> GenerationResult:
        """See engine.pipeline.Pipeline.generate."""
        ...


class Builder(Protocol):
    """Joins the other ranks through the `rendezvous` file and loads the model. Raises BadModel."""

    def __call__(self, plan: NodePlan, index: int, rendezvous: Path) -> RankPipeline:
        """The pipeline of rank `index`, warm."""
        ...


def builder(path: str) -> Builder:
    """The builder at an import path such as ``worker.build:build``. Raises BadModel when there is none."""
    module, _, name = path.partition(":")
    try:
        return cast(Builder, getattr(import_module(module), name))
    except (ImportError, AttributeError, ValueError) as error:
        raise BadModel(f"REEL_ENGINE is {path!r}, expected module:function ({error})") from None


def build(plan: NodePlan, index: int, rendezvous: Path) -> RankPipeline:
    """The engine itself, on this rank's GPU or share of the CPU."""
    import torch

    from engine.errors import CheckpointError
    from engine.load import load_pipeline
    from engine.parallel.mesh import Mesh
    from engine.specs import KNOWN
    from engine.warmup import warm_up

    settings = plan.settings
    torch.set_num_threads(plan.threads)
    device = torch.device("cpu")
    if plan.device == "cuda":
        import ray

        # All GPUs stay visible to all ranks; Ray says which is whose.
        device = torch.device("cuda", int(ray.get_gpu_ids()[0]))
        torch.cuda.set_device(device)
    mesh = Mesh.single()
    if plan.ranks > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
        mesh = Mesh.init(
            backend="gloo" if plan.device == "cpu" else "nccl",
            init_method=f"file://{rendezvous}",
            rank=index,
            world_size=plan.ranks,
            timeout_seconds=settings.rank_timeout_seconds,
            device=device,
        )
    memory = settings.gpu_memory_gib
    try:
        pipeline = load_pipeline(
            plan.model,
            mesh=mesh,
            device=device,
            dtype=torch.bfloat16 if plan.device == "cuda" else torch.float32,
            name=plan.name if plan.name in KNOWN else None,
            loras=settings.lora_dir,
            verify=settings.verify_checkpoint,
            memory_limit=None if memory is None else int(memory * 2**30),
            forbidden=settings.forbidden,
            weights=settings.weights,
        )
        if settings.warm_up:
            warm_up(pipeline)
        return pipeline
    except (CheckpointError, FileNotFoundError) as error:
        raise BadModel(str(error)) from None
