"""What a guarded step costs on a model's gradients, beside a bare norm and torch's clipping: ``gradguard cost``."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import pkgutil
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_gradguard.clippers.adaptive import AdaGC, AutoClip, ZClip
from lightning_gradguard.clippers.base import Clipper
from lightning_gradguard.clippers.fixed import AGC
from lightning_gradguard.clippers.spike_clip import SpikeClip
from lightning_gradguard.engine.sampling_schedule import LATER, SETTLED
from lightning_gradguard.guard import Guard

#: Steps in a cycle: a guard reads weights in one of so many, and figures are means over all of them.
CYCLE = LATER
#: Steps that guards take before the clock counts: at first they look closer, and learn what is ordinary.
WARM_UP = SETTLED

#: Limit of ``clip_grad_norm_``; the gradients of a quiet step are about half as large.
MAX_NORM = 1.0

BARE, CLIP = "bare norm", "clip_grad_norm_"

Arms = Mapping[str, Callable[[], object]]


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least one number."""
        low, median, high = statistics.quantiles(
            values * 2 if len(values) == 1 else values, method="inclusive"
        )
        return cls(median, low, high)


@dataclass(frozen=True)
class Timings:
    """What interleaved arms took.

    Attributes:
        seconds: Name of an arm to its seconds, one number a round; the rounds are whole cycles.
        findings: What the guards found, which should be nothing on quiet steps.
        clipped: Share of the guards' steps that were clipped, and so rewrote the gradients.
    """

    seconds: dict[str, list[float]]
    findings: int = 0
    clipped: float = 0.0

    def step(self, arm: str) -> Spread:
        """Seconds of a step, the mean over a cycle; see `over_a_cycle`."""
        return over_a_cycle(_cycles(self.seconds[arm]))

    def median(self, arm: str) -> float:
        """Seconds of the median step, which hides the costly one in each cycle."""
        return statistics.median(self.seconds[arm])

    def ratio(self, arm: str, base: str) -> Spread:
        """Seconds of an arm over those of another in the same round, the mean over a cycle.

        What slows a machine down for a while slows both, so that the ratio is steadier than either.
        """
        pairs = zip(self.seconds[arm], self.seconds[base], strict=True)
        return over_a_cycle(_cycles([mine / other for mine, other in pairs]))


def over_a_cycle(cycles: list[list[float]]) -> Spread:
    """The mean, over the places in a cycle, of median and quartiles over the cycles.

    So a step that costs more in every cycle counts in full, and an interruption by another program does not.

    Args:
        cycles: Numbers of each cycle, all of one length.
    """
    places = [Spread.of(list(values)) for values in zip(*cycles, strict=True)]
    low, median, high = (
        statistics.fmean(getattr(p, name) for p in places) for name in ("low", "median", "high")
    )
    return Spread(median, low, high)


def _cycles(values: list[float]) -> list[list[float]]:
    return [values[begin : begin + CYCLE] for begin in range(0, len(values), CYCLE)]


class QuietTraining:
    """Random gradients on a model's parameters, which vary a little, while weights move and the loss falls.

    Takes the memory of the parameters twice more. The parameters are changed.

    Args:
        model: Whose trainable parameters get gradients.
        norm: Typical global norm of the gradients, L2.
        step: Root mean square of what each weight moves by: so little that no update is out of the ordinary.
    """

    def __init__(self, model: nn.Module, norm: float = 0.5 * MAX_NORM, step: float = 1e-5) -> None:
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        size = norm / math.sqrt(max(1, sum(p.numel() for p in self.parameters)))
        self._kept = [torch.randn_like(p) * size for p in self.parameters]
        self._places = [torch.empty_like(g) for g in self._kept]
        self.loss = torch.tensor(2.0)
        self._random, self._rate, self._noise, self._steps = random.Random(0), step / size, 0.0, 0
        self.restore()

    @torch.no_grad()
    def advance(self) -> None:
        """The next step: other gradients, weights that moved, a lower loss."""
        torch._foreach_add_(self.parameters, self._kept, alpha=-self._rate)
        before, self._noise = self._noise, self._random.gauss(0.0, 0.1)
        torch._foreach_mul_(self._kept, math.exp(self._noise - before))
        self._steps += 1
        self.loss = torch.tensor(2.0 * math.exp(-self._steps / 200) * (1 + 0.01 * self._random.random()))

    @torch.no_grad()
    def restore(self) -> None:
        """Writes this step's gradients again, as a backward pass would, so that every arm finds the same in memory.

        They are new tensors, as after ``zero_grad``, so that nobody can know them from before.
        """
        torch._foreach_copy_(self._places, self._kept)
        self.gradients = [place.detach() for place in self._places]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def wait(self) -> None:
        """Waits for an accelerator, whose work is not done when a call returns."""
        kind = self.parameters[0].device.type
        if kind != "cpu":
            getattr(torch, kind).synchronize()


def measure(
    model: nn.Module,
    clipper: Clipper | None = None,
    steps: int = 200,
    more: Arms | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Times `Guard.step` on quiet steps beside a bare norm of all gradients and ``clip_grad_norm_``.

    Interleaved step by step in one process, in an order that is shuffled anew each step.

    Args:
        model: Whose parameters get random gradients, on the device where they lie; they are changed.
        clipper: Adds an arm of a guard with it.
        steps: Timed steps; made up to whole cycles.
        more: Further arms, called with gradients on the model's parameters.
        clock: What tells seconds; ``time.process_time`` leaves out what other programs take from a shared CPU.

    Returns:
        The timings of "bare norm", "clip_grad_norm_", "Guard", "Guard, <clipper>" and the further arms.
    """
    training = QuietTraining(model)
    guards = {"Guard": Guard(model.named_parameters())}
    if clipper is not None:
        guards[f"Guard, {type(clipper).__name__}"] = Guard(model.named_parameters(), clipper=clipper)
    arms: dict[str, Callable[[], object]] = {
        BARE: lambda: torch.stack(torch._foreach_norm(training.gradients)).norm(),
        # Nothing exceeds the limit; it multiplies all the same.
        CLIP: lambda: nn.utils.clip_grad_norm_(training.parameters, MAX_NORM),
        **{name: lambda guard=guard: guard.step(loss=training.loss) for name, guard in guards.items()},  # type: ignore[misc]
        **(more or {}),
    }
    _interleave({name: arms[name] for name in guards}, WARM_UP - CYCLE, training, clock)
    seconds = _interleave(arms, CYCLE * (1 + math.ceil(steps / CYCLE)), training, clock)
    judged = sum(guard.counts["judged"] for guard in guards.values())
    return Timings(
        # The first cycle is the other arms' warm-up.
        {name: values[CYCLE:] for name, values in seconds.items()},
        findings=sum(len(guard.findings) for guard in guards.values()),
        clipped=sum(guard.counts["clipped"] for guard in guards.values()) / judged,
    )


def _interleave(
    arms: Arms, rounds: int, training: QuietTraining, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each arm in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order, dice = list(arms), random.Random(0)
    for _ in range(rounds):
        training.advance()
        dice.shuffle(order)
        for name in order:
            training.restore()
            training.wait()
            begun = clock()
            arms[name]()
            training.wait()
            seconds[name].append(clock() - begun)
    return seconds


#: The clippers that need no argument.
CLIPPERS: dict[str, Callable[[], Clipper]] = {c.__name__: c for c in (SpikeClip, AGC, AutoClip, ZClip, AdaGC)}


class CostError(ValueError):
    """What was named cannot be measured; the message says why, and what to name instead."""


def run(spec: str, clipper: str, steps: int, console: Console) -> None:
    """Measures what was named and prints the table.

    Args:
        spec: Such as ``train:make_model``.
        clipper: Name of a clipper that needs no argument.
        steps: Timed steps.
        console: Where the table goes.

    Raises:
        CostError: If the model or the clipper is none.
    """
    model, chosen = model_of(spec), clipper_of(clipper)
    trainable = [p for p in model.parameters() if p.requires_grad]
    console.print(
        f"{sum(p.numel() for p in trainable):,} parameters in {len(trainable):,} tensors, {trainable[0].device}, "
        f"threads: {torch.get_num_threads()}. Compare with the milliseconds of your own training step."
    )
    timings = measure(model, chosen, steps)
    console.print(table(timings))
    console.print(
        f"Quiet steps on random gradients. A guard reads weights in one of {CYCLE} steps; means are over such a cycle, "
        "of medians; in brackets, of quartiles."
    )
    if timings.clipped or timings.findings:
        console.print(
            f"Not all steps were quiet: {timings.clipped:.0%} were clipped, and {timings.findings} findings made."
        )


def table(timings: Timings) -> Table:
    """Milliseconds a step, and how many times a bare norm and torch's clipping that is."""
    shown = Table(box=SIMPLE_HEAD)
    shown.add_column("at every step", no_wrap=True)
    for head in ("ms, mean", "ms, median", f"over {BARE}", f"over {CLIP}"):
        shown.add_column(head, justify="right")
    for arm in timings.seconds:
        ratios = [timings.ratio(arm, base) for base in (BARE, CLIP)]
        cells = [f"{r.median:.2f} ({r.low:.2f}–{r.high:.2f})" for r in ratios]
        shown.add_row(
            arm, f"{1e3 * timings.step(arm).median:.3f}", f"{1e3 * timings.median(arm):.3f}", *cells
        )
    return shown


def clipper_of(name: str) -> Clipper:
    """The clipper of that name, with its defaults.

    Raises:
        CostError: If there is none.
    """
    if name not in CLIPPERS:
        raise CostError(
            f"--clipper must be one of {', '.join(CLIPPERS)}, got {name!r}{_nearest(name, CLIPPERS)}"
        )
    return CLIPPERS[name]()


def model_of(spec: str) -> nn.Module:
    """Imports a model, or what gives one when called without arguments, from the current folder too.

    Args:
        spec: Module and name, such as ``train:make_model`` or ``train:Model``.

    Raises:
        CostError: If it cannot be imported or called, is no module, or has nothing that can be trained.
    """
    found = _import(spec)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise CostError(f"{spec} must be a model or give one when called, got {type(found).__name__}")
        try:
            found = found()
        except Exception as error:
            raise CostError(
                f"{spec} could not be called without arguments: {_line(error)}; "
                "name a function that takes none and returns the model"
            ) from error
    if not isinstance(found, nn.Module):
        raise CostError(f"{spec} must give an nn.Module, got {type(found).__name__}; return the model itself")
    trainable = [p for p in found.parameters() if p.requires_grad]
    if not trainable:
        raise CostError(f"{spec} must give a model with trainable parameters, got none")
    if any(is_lazy(p) or p.is_meta for p in trainable):
        raise CostError(
            f"{spec} must give a model whose parameters have values, got lazy or meta ones; "
            "run a batch through it, or build it on a real device"
        )
    return found


def _import(spec: str) -> Any:
    name, _, path = spec.partition(":")
    if not name or not path:
        raise CostError(
            f"the model must be a module and a name in it, such as train:make_model, got {spec!r}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        here = [m.name for m in pkgutil.iter_modules([os.getcwd()])]
        raise CostError(f"{name} could not be imported: {_line(error)}{_nearest(name, here)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise CostError(f"{spec}: there is no {part!r} in {name}{_nearest(part, dir(found))}")
        found = getattr(found, part)
    return found


def _nearest(name: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [c for c in choices if not c.startswith("_")], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
