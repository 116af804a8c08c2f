"""One run of the presets' speed: every contestant checked, then timed, on one share's inputs."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from benchmarks import _eight_variants as eight
from benchmarks import _variants as variants
from benchmarks._eight_check import Check, attention_error
from benchmarks._measure import Step, Sustained, profile_kernels, sustained
from benchmarks._preset_tables import CUDNN, EIGHT, FLASH2, FLOOR, KEPT, LOSSLESS, alone
from benchmarks._verify import WrongResult
from kernels.attention import choice, choose
from kernels.attention_8bit.choice import TOLERANCE

# Bounds of relative errors. bf16 rounds by up to 0.4 %, e4m3 by up to 6 %, on both sides of a product.
BF16, PRODUCTS_8, BLOCK_8, SAME = 1e-2, 5e-2, 1e-1, 1e-3
ATTENTION_ALONE = 1e-1  # of one that only sets a floor


@dataclass(frozen=True)
class Contestant:
    """What is timed: `error` must be within `bound` first. Both are made when their turn comes."""

    bound: float
    error: Callable[[], float]
    make: Callable[[], Step]
    optional: bool = False  # by a library that may be absent: no figure is no failure


class Run:
    """One run's contestants over one share's inputs, and what came of them."""

    def __init__(self, share: variants.Share, seconds: float, device: str) -> None:
        self.share, self.seconds, self.device = share, seconds, device
        self.inputs = variants.Inputs(share, device=device)
        self.check = Check(share.model, device)
        self.results: dict[str, dict[str, Any]] = {}
        self.problems: dict[str, str] = {}
        self.stack: dict[str, float] = {}
        self.failed = False  # whether something that needs no optional library has no figure

    @cached_property
    def backends(self) -> dict[str, variants.Attend]:
        """8-bit attentions by name."""
        return eight.backends(self.inputs.device)

    @cached_property
    def chosen(self) -> str:
        """The engine's 8-bit attention; where it finds none right, the first, which will fail its check."""
        try:
            return eight.chosen(self.inputs)
        except RuntimeError as failure:
            self.problems["the engine's choice"] = str(failure)
            return next(iter(self.backends))

    def contestants(self) -> Iterator[tuple[str, Contestant]]:
        """In the order of their turns: what could break the device's state comes after what can't."""
        yield from self._plain()
        yield from self._eight_bit()
        yield from self._attentions()
        yield (
            FLOOR,
            Contestant(
                ATTENTION_ALONE,
                lambda: self._attention_error(self.fastest()),
                lambda: eight.floor(self.inputs, self.fastest()),
            ),
        )
        for name in self.backends:
            if name != self.chosen:
                yield f"{EIGHT}, attention by {name}", self._by_backend(name)

    def _official(self, attend: variants.Attend) -> Contestant:
        return Contestant(
            BF16, lambda: self.check.official(attend), lambda: variants.official(self.inputs, attend)
        )

    def _plain(self) -> Iterator[tuple[str, Contestant]]:
        """bf16: the official blocks, ours, and its parts."""
        cuda = self.device == "cuda"
        yield FLASH2, self._official(variants.library("flash2" if cuda else "sdpa"))
        if cuda:
            yield CUDNN, self._official(variants.library("cudnn"))
        yield (
            LOSSLESS,
            Contestant(
                BF16,
                lambda: self.check.fused(variants.own_sequence(self.check.inputs), None),
                lambda: variants.ours(self.inputs),
            ),
        )
        products = self._products
        yield (
            "products, bf16",
            Contestant(BF16, lambda: products.error(products.plain()), lambda: products.plain()),
        )
        head = self.share.config.head_dim
        device = self.inputs.device
        yield (
            "attention, bf16, the engine's choice",
            self._attention(lambda q, k, v: choose("self", torch.bfloat16, head, device)(q, k, v)),
        )
        if cuda:
            yield "attention, bf16, cuDNN", self._attention(variants.library("cudnn"))

    def _attention(self, attend: variants.Attend) -> Contestant:
        inputs = self.inputs
        return Contestant(
            BF16, lambda: attention_error(inputs, attend), lambda: lambda: attend(*inputs.received)
        )

    @cached_property
    def _products(self) -> eight.Products:
        return eight.Products(self.inputs)

    def _eight_bit(self) -> Iterator[tuple[str, Contestant]]:
        """The engine's own 8-bit block, and its products."""
        products = self._products
        yield (
            "products, e4m3",
            Contestant(PRODUCTS_8, lambda: products.error(products.eight_bit()), products.eight_bit),
        )
        inputs, small = self.inputs, self.check.inputs
        yield (
            EIGHT,
            Contestant(
                BLOCK_8,
                lambda: self._error_by(self.chosen, self.check.fused(*eight.engines(small))),
                lambda: eight.eight_bit(inputs, *eight.engines(inputs)),
            ),
        )
        yield (
            KEPT,
            Contestant(
                SAME,
                lambda: self.check.kept(*self._small(self.chosen)),
                lambda: eight.eight_bit(inputs, *eight.engines(inputs), reuse_attention=True),
            ),
        )

    def _attentions(self) -> Iterator[tuple[str, Contestant]]:
        """Each 8-bit attention alone, the engine's choice first."""
        for name in sorted(self.backends, key=lambda name: name != self.chosen):
            yield (
                alone(name),
                Contestant(
                    ATTENTION_ALONE,
                    lambda name=name: self._attention_error(name),  # type: ignore[misc]
                    lambda name=name: eight.attention_alone(self.inputs, name)[0],  # type: ignore[misc]
                    optional=name != self.chosen,
                ),
            )

    def _by_backend(self, name: str) -> Contestant:
        """The 8-bit block by one attention that the engine doesn't choose."""
        attend = self.backends[name]
        return Contestant(
            BLOCK_8,
            lambda: self._error_by(name, self.check.fused(*self._small(name))),
            lambda: eight.eight_bit(self.inputs, *eight.by_backend(self.inputs, attend)),
            optional=True,
        )

    def _small(self, name: str) -> tuple[variants.ShareSequence, eight.EightBitBlocks]:
        """The check's block by one 8-bit attention."""
        return eight.by_backend(self.check.inputs, self.backends[name])

    def _attention_error(self, name: str) -> float:
        return attention_error(self.inputs, self.backends[name])

    def _error_by(self, name: str, block: float) -> float:
        """A block's error. WrongResult where its attention is not what the engine would take."""
        error = self._attention_error(name)
        if not error < TOLERANCE:
            raise WrongResult(f"its attention: relative error {error:.3g}, the bound is {TOLERANCE:g}")
        return block

    def fastest(self) -> str:
        """The 8-bit attention that was fastest alone in this run; the engine's where none was timed."""
        timed = [name for name in self.backends if alone(name) in self.results]
        return min(timed, key=lambda name: float(self.results[alone(name)]["ms"]), default=self.chosen)

    def time(self, name: str, contestant: Contestant) -> None:
        """Check, then time; a wrong or failing one leaves a problem and no figure. What it was is let go."""
        try:
            error = contestant.error()
            if not error <= contestant.bound:
                raise WrongResult(f"relative error {error:.3g}, the bound is {contestant.bound:g}")
            step = contestant.make()
            timed = sustained(step, self.seconds) if self.device == "cuda" else rehearsed(step, self.seconds)
            kernels = profile_kernels(step) if self.device == "cuda" else {}
        except Exception as failure:  # any library may fail in any way, and costs its own figure alone
            self.problems[name] = f"{type(failure).__name__}: {failure}"[:400]
            self.failed |= not contestant.optional
            return
        self.results[name] = asdict(timed) | {
            "error": error,
            "bound": contestant.bound,
            "kernels": dict(list(kernels.items())[:12]),
        }
        if name == FLOOR:
            self.results[name]["attention"] = self.fastest()

    def measure_stack(self) -> None:
        """Relative errors of as many blocks as the model has, by the lossless and by the 8-bit one."""
        small, blocks = self.check.inputs, self.share.config.num_layers
        try:
            for name, ours in (
                (LOSSLESS, (variants.own_sequence(small), None)),
                (EIGHT, self._small(self.chosen)),
            ):
                self.stack[name] = self.check.fused(*ours, blocks=blocks)
        except Exception as failure:  # as in `time`
            self.problems["errors of a stack"] = f"{type(failure).__name__}: {failure}"[:400]
            self.failed = True

    def report(self) -> dict[str, Any]:
        """What the tables are made of, so far."""
        head, device = self.share.config.head_dim, self.inputs.device
        return {
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "a CPU, a rehearsal",
            "torch": torch.__version__,
            "share": asdict(self.share) | {"tokens": self.share.tokens, "heads": self.share.heads},
            "attention": {k: choice(k, torch.bfloat16, head, device) for k in ("self", "cross")},
            "stack": {"blocks": self.share.config.num_layers, "errors": self.stack},
            "results": self.results,
            "problems": self.problems,
        }

    def go(self, only: list[str], budget: float, write: Callable[[dict[str, Any]], None]) -> None:
        """All contestants whose name contains one of `only`; none begins `budget` seconds after the first."""
        began = time.monotonic()
        for name, contestant in self.contestants():
            if only and not any(part in name for part in only):
                continue
            if time.monotonic() - began > budget:
                self.problems[name] = f"not begun: {budget:.0f} s were up"
                self.failed = True
                continue
            self.time(name, contestant)
            if name == EIGHT and name in self.results:
                self.measure_stack()
            told = f"{self.results[name]['ms']:.2f} ms" if name in self.results else self.problems[name]
            print(f"  {name}: {told} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
            write(self.report())
            if not alive():
                self.failed = True
                return


def rehearsed(step: Step, seconds: float) -> Sustained:
    """As `sustained` on a CPU: no clock, no power, no profile."""
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return Sustained(
        statistics.median(times), {}, len(times), time.perf_counter() - begin, math.nan, math.nan
    )


def alive() -> bool:
    """Whether the GPU still answers: after an illegal access no later figure would come."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as failure:  # torch has several types for it
        print(f"the GPU no longer answers: {failure}", file=sys.stderr, flush=True)
        return False
    return True
