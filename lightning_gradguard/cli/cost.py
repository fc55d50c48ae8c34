"""Time a guarded step: ``gradguard cost``."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_gradguard.cli.progress import show_bar
from lightning_gradguard.cli.user_code import CommandError, did_you_mean, import_or_build
from lightning_gradguard.clippers.adaptive import AdaGC, AutoClip, ZClip
from lightning_gradguard.clippers.base import Clipper
from lightning_gradguard.clippers.fixed import AGC
from lightning_gradguard.clippers.spike_clip import SpikeClip
from lightning_gradguard.clippers.steady_clip import SteadyClip
from lightning_gradguard.engine.sampling_schedule import LATER, SETTLED
from lightning_gradguard.guard import Guard

#: Steps in a cycle: a guard reads the weights in one of them, so figures are means over whole cycles.
CYCLE = LATER
#: Steps that guards take before they are timed: a guard evaluates its first steps in full.
WARM_UP = SETTLED

#: Limit of ``clip_grad_norm_``; the gradients of an ordinary step are about half as large.
MAX_NORM = 1.0

BARE, CLIP = "bare norm", "clip_grad_norm_"

#: Bytes that go through the caches between the gradients and what is timed: those of weights and moments, but at least
#: what empties the caches of one core, and at most what empties those of a processor.
_LEAST_OTHERS, _MOST_OTHERS = 2**22, 2**27

#: The clippers that need no argument.
CLIPPERS: dict[str, Callable[[], Clipper]] = {
    c.__name__: c for c in (SteadyClip, SpikeClip, AGC, AutoClip, ZClip, AdaGC)
}

#: Functions to time, by name.
Arms = Mapping[str, Callable[[], object]]


def run(spec: str, clipper: str, steps: int, console: Console) -> None:
    """Time a guarded step and print the table.

    Args:
        spec: Module and name of the model, such as ``train:make_model``.
        clipper: Name of a clipper that needs no argument.
        steps: Steps to time.
        console: Console to print to.

    Raises:
        CommandError: If the model or the clipper cannot be used.
    """
    model, chosen = model_of(spec), clipper_of(clipper)
    trainable = [p for p in model.parameters() if p.requires_grad]
    threads = torch.get_num_threads()
    console.print(
        f"{sum(p.numel() for p in trainable):,} parameters in {len(trainable):,} tensors, {trainable[0].device}, "
        f"{threads} thread{'s' if threads > 1 else ''}."
    )
    with show_bar("Timing steps", rounds(steps)) as advance:
        timings = measure(model, chosen, steps, after_round=advance)
    console.print(table(timings))
    console.print(
        "Compare the milliseconds with those of your own training step. The gradients are random and ordinary, with "
        f"nothing to report. A guard also reads the weights in one of {CYCLE} steps, so means and ratios are "
        "over that many steps; brackets hold quartiles."
    )
    if timings.clipped or timings.findings:
        console.print(
            f"Of the guards' steps {timings.clipped:.0%} were clipped, which rewrites the gradients; findings: "
            f"{timings.findings}."
        )


def table(timings: Timings) -> Table:
    """Return a table of times and ratios."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1))
    shown.add_column("each step", no_wrap=True)
    for head in ("mean\nms", "median\nms", f"times\n{BARE}", f"times\n{CLIP}"):
        shown.add_column(head, justify="right", no_wrap=True)
    for arm in timings.seconds:
        ratios = [timings.ratio(arm, base) for base in (BARE, CLIP)]
        cells = [f"{_digits(r.median)} ({_digits(r.low)}–{_digits(r.high)})" for r in ratios]
        mean, median = timings.step(arm).median, timings.median(arm)
        shown.add_row(arm, f"{1e3 * mean:.3f}", f"{1e3 * median:.3f}", *cells)
    return shown


def _digits(ratio: float) -> str:
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}"


def clipper_of(name: str) -> Clipper:
    """Return a clipper with default arguments.

    Args:
        name: Name of its class.

    Raises:
        CommandError: If there is no such clipper.
    """
    if name not in CLIPPERS:
        raise CommandError(
            f"--clipper must be one of {', '.join(CLIPPERS)}, got {name!r}{did_you_mean(name, CLIPPERS)}"
        )
    return CLIPPERS[name]()


def model_of(spec: str) -> nn.Module:
    """Import or build a model.

    Args:
        spec: Module and name, such as ``train:make_model`` or ``train:Model``.

    Raises:
        CommandError: If it cannot be imported or called, or is no model that can be trained.
    """
    found = import_or_build(spec, "the model", (nn.Module,), "a model")
    if not isinstance(found, nn.Module):
        raise CommandError(f"{spec} must return an nn.Module, got {type(found).__name__}")
    trainable = [p for p in found.parameters() if p.requires_grad]
    if not trainable:
        raise CommandError(f"{spec} must have trainable parameters, got none")
    if any(is_lazy(p) or p.is_meta for p in trainable):
        raise CommandError(
            f"{spec} must have parameters with values, got lazy or meta ones; "
            "run a batch through the model, or build it on a real device"
        )
    return found


def measure(
    model: nn.Module,
    clipper: Clipper | None = None,
    steps: int = 200,
    more: Arms | None = None,
    clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[], object] = lambda: None,
) -> Timings:
    """Time `Guard.step` on ordinary steps.

    A bare norm and ``clip_grad_norm_`` are timed beside it. All run in one process, one after the other, in an order
    that is shuffled at each step.

    Args:
        model: Model whose parameters get random gradients, on the device that holds them; they are changed.
        clipper: Clipper of a second guard; None times none.
        steps: Steps to time; rounded up to whole cycles.
        more: Further functions to time, called with gradients on the model's parameters.
        clock: Clock in seconds; ``time.process_time`` excludes the time that other programs take on a shared CPU.
        after_round: Called after each of the `rounds`, when nothing is timed.

    Returns:
        The timings of "bare norm", "clip_grad_norm_", "Guard", "Guard, <clipper>" and the further functions.
    """
    training = SyntheticTraining(model)
    guards = {"Guard": Guard(model.named_parameters())}
    if clipper is not None:
        guards[f"Guard, {type(clipper).__name__}"] = Guard(model.named_parameters(), clipper=clipper)
    arms: dict[str, Callable[[], object]] = {
        BARE: lambda: torch.stack(torch._foreach_norm(training.gradients)).norm(),
        # No norm exceeds the limit, but torch multiplies the gradients all the same.
        CLIP: lambda: nn.utils.clip_grad_norm_(training.parameters, MAX_NORM),
        **{name: lambda guard=guard: guard.step(loss=training.loss) for name, guard in guards.items()},  # type: ignore[misc]
        **(more or {}),
    }
    warm_up = WARM_UP - CYCLE
    _time_in_turns({name: arms[name] for name in guards}, warm_up, training, clock, after_round)
    seconds = _time_in_turns(arms, rounds(steps) - warm_up, training, clock, after_round)
    judged = sum(guard.counts["judged"] for guard in guards.values())
    return Timings(
        # The first cycle warms up the other arms.
        {name: values[CYCLE:] for name, values in seconds.items()},
        findings=sum(len(guard.findings) for guard in guards.values()),
        clipped=sum(guard.counts["clipped"] for guard in guards.values()) / judged,
    )


def rounds(steps: int) -> int:
    """Return the rounds in which that many steps are timed, with those that warm up."""
    return WARM_UP - CYCLE + CYCLE * (1 + math.ceil(steps / CYCLE))


def _time_in_turns(
    arms: Arms,
    rounds: int,
    training: SyntheticTraining,
    clock: Callable[[], float],
    after_round: Callable[[], object],
) -> dict[str, list[float]]:
    """Return each arm's seconds in shuffled rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order, generator = list(arms), random.Random(0)
    for _ in range(rounds):
        training.advance()
        generator.shuffle(order)
        for name in order:
            training.restore()
            training.wait()
            start = clock()
            arms[name]()
            training.wait()
            seconds[name].append(clock() - start)
        after_round()
    return seconds


class SyntheticTraining:
    """Ordinary training without a forward pass.

    Gradients are random and vary a little, weights move, and the loss falls. Gradients and memory are as a training
    step leaves them: gradients are new tensors that a backward pass has made, and what else a step touches has gone
    through the caches since. Takes twice the memory of the parameters, which are changed, and up to 128 MiB.

    Args:
        model: Model whose trainable parameters get gradients.
        norm: Typical global L2 norm of the gradients.
        step: Root mean square of each weight's change in a step, small enough that no update is reported.
    """

    def __init__(self, model: nn.Module, norm: float = 0.5 * MAX_NORM, step: float = 1e-5) -> None:
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        size = norm / math.sqrt(max(1, sum(p.numel() for p in self.parameters)))
        self._kept = [torch.randn_like(p) * size for p in self.parameters]
        # Stands for the weights and the two moments of Adam; ones, since pages of zeros may be one page.
        others = min(max(3 * sum(p.nbytes for p in self.parameters), _LEAST_OTHERS), _MOST_OTHERS)
        self._others = torch.ones(others // 4, device=self.parameters[0].device, dtype=torch.float32)
        self.loss = torch.tensor(2.0)
        self._random, self._rate, self._noise, self._steps = random.Random(0), step / size, 0.0, 0
        self.restore()

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients, collected from the parameters as any loop has to."""
        return [p.grad for p in self.parameters]  # type: ignore[misc]

    @torch.no_grad()
    def advance(self) -> None:
        """Change gradients, weights and loss for a new step."""
        torch._foreach_add_(self.parameters, self._kept, alpha=-self._rate)
        before, self._noise = self._noise, self._random.gauss(0.0, 0.1)
        torch._foreach_mul_(self._kept, math.exp(self._noise - before))
        self._steps += 1
        self.loss = torch.tensor(2.0 * math.exp(-self._steps / 200) * (1 + 0.01 * self._random.random()))

    def restore(self) -> None:
        """Make this step's gradients again, and leave the caches to other memory.

        So each arm finds what a training step finds after ``zero_grad()`` and backward. Gradients that are written
        again into memory that was just read would be in the caches, and so would all that was noted of them.
        """
        for parameter in self.parameters:
            parameter.grad = None
        torch.autograd.backward(self.parameters, self._kept)
        self._others.sum()

    def wait(self) -> None:
        """Synchronize the accelerator, if any."""
        kind = self.parameters[0].device.type
        if kind != "cpu":
            getattr(torch, kind).synchronize()


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of one or more numbers."""
        low, median, high = statistics.quantiles(
            values * 2 if len(values) == 1 else values, method="inclusive"
        )
        return cls(median, low, high)


@dataclass(frozen=True)
class Timings:
    """Times of functions that took turns.

    Attributes:
        seconds: Seconds in each round by the name of the arm; the rounds are whole cycles.
        findings: Number of findings that the guards made; 0 on ordinary steps.
        clipped: Share of the guards' steps that were clipped, which rewrites the gradients; 0 to 1.
    """

    seconds: dict[str, list[float]]
    findings: int = 0
    clipped: float = 0.0

    def step(self, arm: str) -> Spread:
        """Return the seconds of the mean step."""
        return over_a_cycle(_cycles(self.seconds[arm]))

    def median(self, arm: str) -> float:
        """Return the median step's seconds, without costly steps."""
        return statistics.median(self.seconds[arm])

    def ratio(self, arm: str, base: str) -> Spread:
        """Return one arm's seconds over another's.

        The ratio is the mean over a cycle. Both times are of the same round. Anything that slows the machine down for a
        while slows both, so the ratio varies less than either.
        """
        pairs = zip(self.seconds[arm], self.seconds[base], strict=True)
        return over_a_cycle(_cycles([mine / other for mine, other in pairs]))


def over_a_cycle(cycles: list[list[float]]) -> Spread:
    """Return the spread of the mean step over cycles.

    Median and quartiles over the cycles are averaged over the places in a cycle. A step that costs more in every cycle
    counts in full, and an interruption by another program does not.

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
