"""Plan of all measurements and their results, in full size or small for a quick check."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from benchmarks.cost import arms, memory, trainer_arms
from benchmarks.cost.measuring import Rounds, interleave
from benchmarks.cost.models import Transformer, tensors
from benchmarks.cost.trainer_arms import BARE, CLIP, OURS, STEADY, Size
from benchmarks.cost.turns import ABLE, take_turns
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
        trainings: Title to size and rounds; every arm trains.
        turns: Title to size, rounds, and the arms that take turns in one training; None for all that can.
    """

    workloads: dict[str, Callable[[], nn.Module]]
    steps: int
    tensors: tuple[int, ...]
    elements: tuple[int, ...]
    growth_steps: int
    trainings: dict[str, tuple[Size, int]]
    turns: dict[str, tuple[Size, int, tuple[str, ...] | None]]


SMALL = Size(layers=4, width=128, vocabulary=512, batch=5, length=64)
LARGE = Size(layers=4, width=256, vocabulary=1024, batch=6, length=64)

FULL = Plan(
    workloads=arms.WORKLOADS,
    steps=3 * CYCLE,
    tensors=(30, 100, 300, 1000, 3000),
    elements=(100_000, 1_000_000, 10_000_000),
    growth_steps=CYCLE,
    trainings={"0.86 million parameters, 51 tensors": (SMALL, 2)},
    turns={
        "0.86 million parameters, 51 tensors": (SMALL, 20, None),
        "3.4 million parameters, 51 tensors": (LARGE, 20, (BARE, CLIP, OURS, STEADY)),
    },
)

QUICK = Plan(
    workloads={
        arms.TRANSFORMER: lambda: Transformer(layers=1, width=32, vocabulary=64, context=16),
        arms.THOUSAND: lambda: tensors([(4, 4)] * 10),
        arms.FOUR_THOUSAND: lambda: tensors([(4, 4)] * 40),
    },
    steps=CYCLE,
    tensors=(10, 20),
    elements=(1000, 10_000),
    growth_steps=CYCLE,
    trainings={"tiny": (Size(1, 32, 64, 2, 8, warm_up=2, steps=4), 1)},
    turns={"tiny": (Size(1, 32, 64, 2, 8, warm_up=2, steps=4), 1, None)},
)


@dataclass
class Results:
    """Results of the measurements.

    Attributes:
        shapes: Title of a workload to its numbers of tensors and elements.
        steps: Title of a workload to the timings of single steps.
        by_tensors: P to the timings on P tensors of 32 × 32.
        by_elements: Number of parameters to the timings on that many in 100 tensors.
        trainings: Title to the seconds of whole trainings.
        turns: Title to the seconds of turns in one training.
        findings: Number of findings of all guards in these trainings.
        held: P to the bytes that a guard over P tensors of 32 × 32 holds, by holder.
        held_wide: Total bytes held over the second largest P, with 64 × 64 tensors.
        python: Bytes of Python objects and arrays of a guard over that P.
    """

    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    steps: dict[str, Timings] = field(default_factory=dict)
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
    found = Results()
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
        # The largest number of tensors only shows how a guard grows; peers would take minutes.
        found.steps[title] = arms.timings(model, plan.steps, clock, with_peers=title != arms.FOUR_THOUSAND)
    for count in plan.tensors:
        report_progress(f"growth, {count} tensors")
        found.by_tensors[count] = arms.timings(_squares(count), plan.growth_steps, clock, with_peers=False)
    for count in plan.elements:
        report_progress(f"growth, {count:,} parameters")
        model = tensors([(count // 1000, 10)] * 100)
        found.by_elements[count] = arms.timings(model, plan.growth_steps, clock, with_peers=False)
    with tempfile.TemporaryDirectory() as folder:
        for title, (size, usual, names) in plan.turns.items():
            report_progress(f"turns, {title}")
            able = [name for name in names or ABLE if name in trainer_arms.available()]
            found.turns[title], findings = take_turns(
                able, size, rounds or usual, Path(folder) / title, clock
            )
            found.findings += findings
        for title, (size, usual) in plan.trainings.items():
            ready = trainer_arms.available()

            def train(name: str, size: Size = size, title: str = title) -> list[float]:
                report_progress(f"training, {title}: {name}")
                seconds, findings = trainer_arms.train(
                    trainer_arms.available()[name], size, Path(folder), clock
                )
                found.findings += findings
                return seconds

            found.trainings[title] = interleave(ready, rounds or usual, train)
    return found


def _squares(count: int) -> nn.Module:
    return tensors([(32, 32)] * count)
