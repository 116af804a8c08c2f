"""Reusing what changes little from step to step: the block stack's residual, and the guidance.

*Steps.* The modulated input of the blocks (patches and timestep, no text) says how much a step's result will
differ: its relative L1 change from step to step is summed, and as long as the sum stays under a threshold
the last computed residual of the whole block stack is added to the new input instead of running the blocks
(the indicator and the sum are TeaCache's, arXiv:2411.19108; residuals instead of outputs and a cap on
reuses in a row are DBCache's published ideas). *Guidance.* Where cond - uncond moved little between the
steps that computed both, a step computes cond alone and takes the last difference. *Self-attention.* Where
the steps' signal, summed since self-attention was last computed, stays under a threshold of its own, a step
whose blocks run takes the kept one (`engine.kept_attention`).

Always computed: the first and last steps, and the first after an expert switch. Decisions come from what
every rank holds alike (whole latents, whole predictions), and rank 0's counts: so they are the same on all
ranks, and in all layouts.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from engine import ops
from engine.conditioning import Conditioning
from engine.config import Work
from engine.dit import DiT
from engine.dit_block import TextKV
from engine.kept_attention import KeptAttention
from engine.parallel.mesh import Mesh
from engine.presets import Preset, Reuse

if TYPE_CHECKING:
    from engine.attention import Sequence

PROBED = 1024  # tokens, evenly spread, whose input is looked at
Rows = tuple[int, ...]  # of the texts: 0 conditional, 1 unconditional
Texts = dict[Rows, TextKV]


class Passes(Protocol):
    """What the cache asks of a pipeline."""

    mesh: Mesh
    device: torch.device
    sequence: "Sequence"

    def passes(self, guide: float) -> list[Rows]:
        """The forwards of a step on this rank."""
        ...


class Residual:
    """One pass's change by the block stack: kept when the blocks run, added instead when it is there."""

    def __init__(self, kept: Tensor | None = None) -> None:
        self.kept = kept  # [B, L here, D] in the weights' dtype

    def __call__(self, x_BLD: Tensor, blocks: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """The stream after the blocks; x is [1 or B, L here, D] fp32."""
        if self.kept is not None:
            return x_BLD + self.kept.float()
        out_BLD = blocks(x_BLD)
        self.kept = (out_BLD - x_BLD).to(dtype)
        return out_BLD


class Decisions:
    """When to reuse. Told of every step in order; knows no tensors."""

    def __init__(self, rule: Reuse, steps: int) -> None:
        self.rule, self.steps = rule, steps
        self.forget()

    def forget(self) -> None:
        """An expert switch: nothing earlier says anything about what comes."""
        self._change, self._in_row, self._computed = 0.0, 0, False
        self._drift: float | None = None  # of the guidance, a step
        self._without = 0  # steps since the guidance was computed
        self._guidance_in_row = 0
        self._old = 0  # steps since self-attention was computed
        self._attention_change: float | None = None  # since then; None: it never was

    def _edge(self, step: int) -> bool:
        return step < self.rule.first or step >= self.steps - self.rule.last

    def reuse_step(self, step: int, change: float) -> bool:
        """Whether this step takes the last computed residual; `change` is its input's since the last step."""
        self._change += change
        self._old += 1
        if self._attention_change is not None:
            self._attention_change += change
        reuse = (
            self._computed
            and not self._edge(step)
            and self._in_row < self.rule.max_reuse
            and self._change < self.rule.step_threshold
        )
        self._without += 1
        if reuse:
            self._in_row += 1
        else:
            self._change, self._in_row, self._computed = 0.0, 0, True
        return reuse

    def reuse_guidance(self, step: int) -> bool:
        """Whether a computed step does without its unconditional pass."""
        reuse = (
            self._drift is not None
            and not self._edge(step)
            and self._guidance_in_row < self.rule.max_reuse
            and self._drift * self._without < self.rule.guidance_threshold
        )
        self._guidance_in_row = self._guidance_in_row + 1 if reuse else 0
        return reuse

    def reuse_attention(self, step: int, there: bool) -> bool:
        """Whether a step whose blocks run takes the last computed self-attention, if all of it is `there`.

        The cap counts all steps since, whatever they reused; those that follow count on from there.
        """
        reuse = (
            there
            and self._attention_change is not None
            and not self._edge(step)
            and self._old <= self.rule.max_reuse
            and self._attention_change < self.rule.attention_threshold
        )
        if reuse:
            self._in_row = self._old
        else:
            self._old, self._attention_change = 0, 0.0
        return reuse

    def guidance_moved(self, change: float | None) -> None:
        """Both passes were computed; `change` is their difference's since they last were, None at first."""
        self._drift = None if change is None else change / self._without
        self._without = 0


class StepCache:
    """One video's flows, in order of its steps."""

    def __init__(self, pipeline: Passes, rule: Reuse, steps: int) -> None:
        self.pipeline, self.mesh = pipeline, pipeline.mesh
        self.decisions = Decisions(rule, steps)
        self.steps_reused = self.guidance_reused = self.attention_reused = 0
        self._expert: DiT | None = None
        self._probe: Tensor | None = None  # the last step's
        self._residuals: dict[Rows, Residual] = {}  # of the last computed step, by its passes on this rank
        self._alone = False  # whether that step was without guidance
        self._kept: dict[Rows, KeptAttention] = {}  # of the last step that computed it; empty where unwanted
        self._kept_alone = False  # whether that one was without guidance
        self._delta: Tensor | None = None  # cond - uncond when both were last computed

    def flow(
        self,
        step: int,
        expert: DiT,
        guide: float,
        t: int,
        latents_CFHW: Tensor,
        text_2TE: Tensor,
        texts: Texts,
        image: Conditioning,
    ) -> Tensor:
        """As `Pipeline.flow`, computed or reused."""
        if expert is not self._expert:
            self._expert, self._probe, self._delta, self._kept = expert, None, None, {}
            self.decisions.forget()
        inputs, timesteps = image.model_input(latents_CFHW)[None], image.timesteps(t, self.pipeline.device)
        reuse = self.mesh.agree(
            self.decisions.reuse_step(step, self._input_change(expert, inputs, timesteps))
        )
        if not reuse:
            self._alone = guide != 1.0 and self.mesh.agree(self.decisions.reuse_guidance(step))
            rows = self._rows(guide)
            self._residuals = {each: Residual() for each in rows}
            self.guidance_reused += self._alone
        attention = not reuse and self._reuse_attention(step)
        self.steps_reused += reuse
        self.attention_reused += attention
        flows = []
        for rows_here, residual in self._residuals.items():
            text = [] if reuse else text_of(expert, rows_here, text_2TE, texts)
            kept = self._kept.get(rows_here) or self._kept.get((0, 1))
            with nullcontext() if reuse or kept is None else kept.used(expert, reusing=attention):
                flows.append(expert(inputs, timesteps, text, self.pipeline.sequence, residual))
        return self._combine(flows, guide, latents_CFHW, keep=not reuse)

    def work(self, quality: str) -> Work:
        """What was done in all."""
        computed = self.decisions.steps - self.steps_reused
        return Work(quality, computed, self.steps_reused, self.guidance_reused, self.attention_reused)

    def _rows(self, guide: float) -> list[Rows]:
        """This rank's passes of a computed step."""
        if not self._alone:
            return self.pipeline.passes(guide)
        return [(0,)] if self.mesh.guidance == 1 or self.mesh.branch == 0 else []

    def _reuse_attention(self, step: int) -> bool:
        """Whether this step's passes take the kept self-attention; else there is a place for their own."""
        if not self.decisions.rule.attention_threshold:
            return False
        there = self._alone or not self._kept_alone
        reuse = self.mesh.agree(self.decisions.reuse_attention(step, there))
        if not reuse:
            self._kept, self._kept_alone = {each: KeptAttention() for each in self._residuals}, self._alone
        return reuse

    def _combine(self, flows: list[Tensor], guide: float, like: Tensor, keep: bool) -> Tensor:
        """The guided flow [C, F, H, W] from this rank's passes."""
        if guide == 1.0:
            return flows[0][0]
        if self.mesh.guidance == 2:  # a branch without a pass gives zeros that nobody reads
            if keep and not flows:
                self._follow_the_blocks()
            both = self.mesh.both_branches(flows[0] if flows else self._nothing(like))
        else:
            both = torch.cat(flows)
        if self._alone:
            assert self._delta is not None
            return both[0] + (guide - 1) * self._delta
        cond, uncond = both
        delta = cond - uncond
        if keep:
            last, self._delta = self._delta, delta
            self.decisions.guidance_moved(None if last is None else _relative(delta, last))
        guided: Tensor = uncond + guide * delta
        return guided

    def _follow_the_blocks(self) -> None:
        """Blocks that are spread over all ranks are gathered by all, also by one that computes nothing."""
        assert self._expert is not None
        if self._expert.keeper is not None:
            for _ in self._expert.visit_blocks(forward=True):
                pass

    def _nothing(self, like_CFHW: Tensor) -> Tensor:
        assert self._expert is not None
        return like_CFHW.new_zeros((1, self._expert.config.out_channels, *like_CFHW.shape[1:]))

    def _input_change(self, expert: DiT, inputs: Tensor, timesteps: Tensor) -> float:
        """Relative L1 change of the blocks' modulated input since the last step; 0 at the first."""
        now = modulated_input(expert, inputs, timesteps)
        last, self._probe = self._probe, now
        return 0.0 if last is None else _relative(now, last)


def modulated_input(expert: DiT, latents_BCFHW: Tensor, timesteps_BS: Tensor) -> Tensor:
    """[1, tokens, D] fp32: embedded patches, normed and modulated by the timestep alone.

    At least PROBED tokens and fewer than twice as many; all, where there are not so many. A block's own
    modulation vectors are constants and may not be on the device, so they are left out.
    """
    patches_BLP = expert.patchify(latents_BCFHW)
    every = max(1, patches_BLP.shape[1] // PROBED)
    x_BLD = expert.embed_patches(patches_BLP[:, ::every])
    shift, scale = expert.embed_time(timesteps_BS)[1][:, -1:].unbind(2)[:2]
    return ops.modulated_norm(x_BLD, shift, scale, 0, expert.config.eps)


def text_of(expert: DiT, rows: Rows, text_2TE: Tensor, texts: Texts) -> TextKV:
    """The text's keys and values for these rows, made once an expert."""
    if rows not in texts:
        both = texts.get((0, 1))
        if both is not None and len(rows) == 1:
            row = slice(rows[0], rows[0] + 1)
            texts[rows] = [(k[row], v[row]) for k, v in both]
        else:
            texts[rows] = expert.encode_text(text_2TE[list(rows)])
    return texts[rows]


def make_cache(pipeline: Passes, preset: Preset | None, steps: int) -> StepCache | None:
    """A cache for a video whose preset reuses anything."""
    return None if preset is None or preset.reuse is None else StepCache(pipeline, preset.reuse, steps)


def _relative(now: Tensor, last: Tensor) -> float:
    return float((now - last).abs().sum() / last.abs().sum().clamp_min(1e-12))
