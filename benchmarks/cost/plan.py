"""Plan of all measurements and their results, in full size or small for a quick check."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from benchmarks.cost import arms, many_tensors, memory, real_turns, toy, trainer_arms
from benchmarks.cost.measuring import Rounds, interleave
from benchmarks.cost.models import tensors
from benchmarks.cost.real_turns import Reals
from benchmarks.cost.trainer_arms import BARE, CLIP, OURS, STEADY, Size
from benchmarks.cost.turns import ABLE, SETTLING, take_turns
from lightning_gradguard.cli.cost import CYCLE, Timings


@dataclass(frozen=True)
class Plan:
    """Measurements to run.

    Attributes:
        workloads: Models for the timing of single steps.
        steps: Timed steps of each workload, in whole sampling cycles.
        tensors: Numbers P of 32 × 32 tensors for the cost and memory tables.
        elements: Numbers of parameters, in 100 tensors, for the cost table.
        growth_steps: Timed steps for each of those sizes.
        first: Trainings of the first steps of a toy, for each arm.
        diverging: Steps and trainings of a toy that diverges.
        fine_tuning: Steps before the first turn, turns and trainings of a toy whose loss has, or has not, halved.
        early: Title, size, turns and trainings, of which each is timed from the first steps on.
        many: Number of tensors, steps and loops of the plain loop over many tensors.
        real: Turns of each model of another package; 0 for none of the models.
        trainings: Title to size and rounds; every arm trains that cannot take turns.
        turns: Title to size, rounds, and the arms that take turns in one training; None for all that can.
    """

    workloads: dict[str, Callable[[], nn.Module]]
    steps: int
    tensors: tuple[int, ...]
    elements: tuple[int, ...]
    growth_steps: int
    first: int
    diverging: tuple[int, int]
    fine_tuning: tuple[int, int, int]
    early: tuple[str, Size, int, int]
    many: tuple[int, int, int]
    real: int
    trainings: dict[str, tuple[Size, int]]
    turns: dict[str, tuple[Size, int, tuple[str, ...] | None]]


SMALL = Size(layers=4, width=128, vocabulary=512, batch=5, length=64)
#: Its turns begin with a guard's step 36, so that full evaluations fall on timed steps; see `real_turns.WARM_UP`.
MEDIUM = Size(layers=3, width=96, vocabulary=512, batch=4, length=64, context=64, warm_up=real_turns.WARM_UP)
LARGE = Size(layers=4, width=256, vocabulary=1024, batch=6, length=64)

FULL = Plan(
    workloads=arms.WORKLOADS,
    steps=CYCLE,
    tensors=(30, 100, 300, 1000, 3000),
    elements=(100_000, 1_000_000, 10_000_000),
    growth_steps=CYCLE,
    first=15,
    diverging=(260, 8),
    fine_tuning=(2000 + SETTLING, 4, 3),
    early=("0.39 million parameters, 40 tensors", MEDIUM, 3, 4),
    many=(5000, 96, 3),
    real=3,
    trainings={"0.86 million parameters, 51 tensors": (SMALL, 2)},
    turns={
        "0.86 million parameters, 51 tensors": (SMALL, 6, None),
        "3.4 million parameters, 51 tensors": (LARGE, 4, (BARE, CLIP, OURS, STEADY)),
    },
)

QUICK = Plan(
    workloads={
        arms.THOUSAND: lambda: tensors([(4, 4)] * 10),
        arms.FOUR_THOUSAND: lambda: tensors([(4, 4)] * 40),
    },
    steps=CYCLE,
    tensors=(10, 20),
    elements=(1000, 10_000),
    growth_steps=CYCLE,
    first=1,
    diverging=(60, 1),
    fine_tuning=(2, 1, 1),
    early=("tiny", Size(1, 32, 64, 2, 8, warm_up=2), 1, 1),
    many=(20, 40, 1),
    real=0,
    trainings={"tiny": (Size(1, 32, 64, 2, 8, warm_up=2, steps=4), 1)},
    turns={"tiny": (Size(1, 32, 64, 2, 8, warm_up=2, steps=4), 1, None)},
)


@dataclass
class Late:
    """Turns at the late steps of a training.

    Attributes:
        share: Last losses as a share of the first ones.
        turns: Seconds of a step in each turn.
    """

    share: float
    turns: Rounds = field(default_factory=Rounds)


@dataclass
class Results:
    """Results of the measurements.

    Attributes:
        plan: What was to be measured.
        shapes: Title of a workload to its numbers of tensors and elements.
        steps: Title of a workload to the timings of single steps.
        clipped: Title of a workload to the share of steps that each clipper clipped, by the name of its arm.
        first: Seconds of the call of ``fit`` up to the first batch, and of each of a toy's first steps.
        diverging: Seconds of the steps of a toy that diverges, from the first finding on.
        faults: Faults found there, in the order in which they came.
        halved: Turns at the late steps of a toy whose loss has halved.
        not_halved: The same of one whose loss has not.
        early: Seconds of turns in a training from its first steps on.
        many: Seconds of a plain loop over many tensors: of a guard's construction, then of each step.
        real: Turns of models of other packages.
        by_tensors: P to the timings on P tensors of 32 × 32.
        by_elements: Number of parameters to the timings on that many in 100 tensors.
        trainings: Title to the seconds of whole trainings.
        turns: Title to the seconds of turns in one training.
        findings: Number of findings of all guards in these trainings.
        held: P to the bytes that a guard over P tensors of 32 × 32 holds, by holder.
        held_wide: Total bytes held over the second largest P, with 64 × 64 tensors.
        python: Bytes of Python objects and arrays of a guard over that P.
    """

    plan: Plan
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    steps: dict[str, Timings] = field(default_factory=dict)
    clipped: dict[str, dict[str, float]] = field(default_factory=dict)
    first: Rounds = field(default_factory=Rounds)
    diverging: Rounds = field(default_factory=Rounds)
    faults: list[str] = field(default_factory=list)
    halved: Late = field(default_factory=lambda: Late(0.0))
    not_halved: Late = field(default_factory=lambda: Late(0.0))
    early: Rounds = field(default_factory=Rounds)
    many: Rounds = field(default_factory=Rounds)
    real: Reals = field(default_factory=Reals)
    by_tensors: dict[int, Timings] = field(default_factory=dict)
    by_elements: dict[int, Timings] = field(default_factory=dict)
    trainings: dict[str, Rounds] = field(default_factory=dict)
    turns: dict[str, Rounds] = field(default_factory=dict)
    findings: int = 0
    held: dict[int, Counter[str]] = field(default_factory=dict)
    held_tensors: int = 0
    held_wide: int = 0
    python: int = 0

    @property
    def reference(self) -> int:
        """P of the detailed memory table: the second largest."""
        return sorted(self.held)[-2]


def run(
    plan: Plan, clock: Callable[[], float], rounds: int | None, report_progress: Callable[[str], None]
) -> Results:
    """Run the whole plan; ``rounds`` overrides the number of repetitions."""
    found = Results(plan)
    _toys(plan, clock, found, report_progress)
    for count in plan.tensors:
        report_progress(f"memory, {count} tensors")
        found.held[count] = memory.held(memory.after_steps(_squares(count)))
    reference = _squares(found.reference)
    found.held_tensors = memory.held(memory.after_steps(reference), (Tensor,)).total()
    found.held_wide = memory.held(memory.after_steps(tensors([(64, 64)] * found.reference))).total()
    found.python = memory.python_bytes(lambda: memory.after_steps(reference))
    for title, make in plan.workloads.items():
        report_progress(f"steps, {title}")
        model = make()
        sizes = [p.numel() for p in model.parameters()]
        found.shapes[title] = len(sizes), sum(sizes)
        found.steps[title], found.clipped[title] = arms.timings(model, plan.steps, clock)
    for count in plan.tensors:
        report_progress(f"growth, {count} tensors")
        found.by_tensors[count], _ = arms.timings(_squares(count), plan.growth_steps, clock, everything=False)
    for count in plan.elements:
        report_progress(f"growth, {count:,} parameters")
        model = tensors([(count // 1000, 10)] * 100)
        found.by_elements[count], _ = arms.timings(model, plan.growth_steps, clock, everything=False)
    with tempfile.TemporaryDirectory() as folder:
        for title, (size, usual, names) in plan.turns.items():
            report_progress(f"turns, {title}")
            able = [name for name in names or ABLE if name in trainer_arms.available()]
            turns = take_turns(able, size, rounds or usual, Path(folder) / title, clock)
            found.turns[title] = turns.rounds
            found.findings += turns.findings
        for title, (size, usual) in plan.trainings.items():
            # The others have taken turns.
            ready = [n for n in trainer_arms.available() if n in (BARE, CLIP, OURS) or n not in ABLE]

            def train(name: str, size: Size = size, title: str = title) -> list[float]:
                report_progress(f"training, {title}: {name}")
                seconds, findings = trainer_arms.train(
                    trainer_arms.available()[name], size, Path(folder), clock
                )
                found.findings += findings
                return seconds

            found.trainings[title] = interleave(ready, rounds or usual, train)
    return found


def _toys(
    plan: Plan, clock: Callable[[], float], found: Results, report_progress: Callable[[str], None]
) -> None:
    """Measure the toys first, as the first things that the process trains."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report_progress("worst, first steps")
        found.first = toy.first_steps(plan.first, folder, clock)
        report_progress("worst, diverging")
        found.diverging, found.faults = toy.diverging(*plan.diverging, folder, clock)
        warm_up, turns, trainings = plan.fine_tuning
        for _ in range(trainings):
            for late, floor in ((found.halved, 0.0), (found.not_halved, toy.FLOOR)):
                report_progress(f"worst, late, constant part of the loss {floor:g}")
                timed, late.share = toy.fine_tuning(floor, warm_up, turns, folder, clock)
                late.turns.extend(timed)
        title, size, turns, trainings = plan.early
        for _ in range(trainings):
            report_progress(f"worst, early, {title}")
            found.early.extend(take_turns((BARE, CLIP, OURS), size, turns, folder, clock).rounds)
    count, steps, loops = plan.many
    report_progress(f"worst, {count:,} tensors")
    found.many = many_tensors.plain_loop(_squares(count), steps, loops, clock)
    if plan.real:
        cases = real_turns.one_of_each_family()
        found.real = real_turns.measure(cases, plan.real, clock, report_progress)


def _squares(count: int) -> nn.Module:
    return tensors([(32, 32)] * count)
