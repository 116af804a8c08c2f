"""LoRAs in the experts' weights: merged for the requests that name them, taken out without a trace.

Merging is W = round(W + sum of the changes), computed in fp32. What W was is kept in host memory, of each
tensor one part a rank, and copied back (and gathered) when a request comes that names other LoRAs or none:
so the weights after are the weights before, bit for bit, however often that happens.
"""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.config import LoraUse
from engine.dit import DiT
from engine.errors import RequestError
from engine.lora_files import Change, LoraFolder, read_lora
from engine.parallel.collectives import all_gather
from engine.parallel.mesh import Mesh
from engine.presets import Preset

Merged = tuple[tuple[LoraUse, tuple[int, int]], ...]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kept:
    """A tensor's original: all of it, or this rank's part of a tensor that every rank holds."""

    parameter: nn.Parameter
    original: Tensor  # flat, in host memory
    gathered: bool

    def restore(self) -> None:
        """Write it back."""
        local = _local(self.parameter)
        if not self.gathered:
            local.copy_(self.original.view(local.shape))
            return
        whole = all_gather(self.original.to(local.device).view(torch.uint8), None).view(-1)
        local.view(-1).copy_(whole.view(local.dtype)[: local.numel()])


class Loras:
    """Which LoRAs the experts carry now."""

    def __init__(self, folder: LoraFolder, high: DiT, low: DiT | None, mesh: Mesh) -> None:
        self.folder, self.mesh = folder, mesh
        self.experts = {"high": high} if low is None else {"high": high, "low": low}
        # Each with its file's stamp; None while they change, and after a change that could not be undone.
        self.merged: Merged | None = ()
        self._kept: list[_Kept] = []

    def check(self, uses: tuple[LoraUse, ...]) -> None:
        """Raise RequestError for a LoRA that isn't in the folder, or an expert that isn't in the model."""
        for use in uses:
            self.folder.path(use.name)
            if use.expert not in ("both", *self.experts):
                raise RequestError("loras", use.expert, ", ".join(("both", *self.experts)))

    def use(self, uses: tuple[LoraUse, ...]) -> None:
        """Have the experts carry exactly these files; a collective call. Raises RequestError."""
        if not uses and self.merged == ():
            return
        self.check(uses)
        wanted = tuple((use, self.folder.stamp(use.name)) for use in uses)
        if not self.mesh.anyone(wanted != self.merged):
            return
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            # Two experts may still be changing places on a stream of their own.
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.merged = None
            self._restore()
            try:
                for name, expert in self.experts.items():
                    self._merge(expert, [use for use in uses if use.expert in ("both", name)])
            except BaseException:
                self._restore()
                self.merged = ()
                raise
        self.merged = wanted
        names = ", ".join(f"{use.name} ({use.expert}, {use.strength:g})" for use in uses) or "none"
        log.info("LoRAs now: %s; took %.2f s", names, time.perf_counter() - began)

    def _merge(self, expert: DiT, uses: list[LoraUse]) -> None:
        parameters = dict(expert.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        # Two uses of one tensor are added up before they are rounded.
        changes: dict[str, list[tuple[float, Change]]] = {}
        for use in uses:
            for name, change in read_lora(self.folder.path(use.name), shapes).items():
                changes.setdefault(name, []).append((use.strength, change))
        for name, listed in changes.items():
            self._change(parameters[name], listed)

    def _change(self, parameter: nn.Parameter, changes: list[tuple[float, Change]]) -> None:
        self.mesh.beat()
        local = _local(parameter)
        self._kept.append(self._keep(parameter))
        total = torch.zeros(parameter.shape, device=local.device)
        for strength, change in changes:
            total += strength * change.to(local.device).delta().view_as(total)
        local.copy_((local.float() + _rows(parameter, total)).to(local.dtype))

    def _keep(self, parameter: nn.Parameter) -> _Kept:
        local = _local(parameter)
        flat = local.view(-1)
        if self.mesh.size == 1 or isinstance(parameter, DTensor):
            return _Kept(parameter, flat.to("cpu", copy=True), gathered=False)
        part = -(-flat.numel() // self.mesh.size)
        start = min(self.mesh.rank * part, flat.numel())
        mine = flat[start : start + part].to("cpu", copy=True)
        # Equal parts for the all-gather; what is past the end is cut off again.
        padded = torch.nn.functional.pad(mine, (0, part - mine.numel()))
        return _Kept(parameter, padded, gathered=True)

    def _restore(self) -> None:
        """Put every original back."""
        while self._kept:
            self.mesh.beat()
            self._kept[-1].restore()
            self._kept.pop()


def distilled(preset: Preset | None) -> tuple[LoraUse, ...]:
    """The LoRAs that a preset of few steps brings along."""
    return tuple(LoraUse(**lora) for lora in preset.few.loras) if preset and preset.few else ()


def _local(parameter: Tensor) -> Tensor:
    """The tensor that this rank holds: of a sharded one its rows."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


def _rows(parameter: Tensor, whole: Tensor) -> Tensor:
    """This rank's rows of `whole`, as FSDP2 deals them out."""
    if not isinstance(parameter, DTensor):
        return whole
    part = -(-whole.shape[0] // parameter.device_mesh.size())
    start = min(parameter.device_mesh.get_local_rank() * part, whole.shape[0])
    return whole[start : start + parameter.to_local().shape[0]]
