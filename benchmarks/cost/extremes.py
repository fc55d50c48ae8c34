"""Rows on top of the page: what a guard usually costs, and the worst of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.cost import arms, many_tensors, trainer_arms
from benchmarks.cost.measuring import Rounds
from benchmarks.cost.plan import Results
from benchmarks.cost.real_turns import FROM
from benchmarks.cost.turns import TURN
from lightning_gradguard.cli.cost import BARE, CLIP, Spread, Timings

TRAINER, CLIPPING, OURS = trainer_arms.BARE, trainer_arms.CLIP, trainer_arms.OURS


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        case: What is trained. With `measured` it finds the row again when numbers change.
        measured: What was timed, and beside what.
        without: Seconds without a guard; None where there is nothing to compare with.
        added: Further seconds with it.
        ratio: Seconds with it over those without; None likewise.
        label: Short name in the picture; empty if it is not drawn.
    """

    case: str
    measured: str
    without: float | None
    added: float
    ratio: Spread | None
    label: str = ""

    @property
    def cells(self) -> list[str]:
        """Cells of the table."""
        spread = self.ratio
        return [
            self.case,
            self.measured,
            "–" if self.without is None else f"{1e3 * self.without:.2f}",
            f"{1e3 * self.added:+.2f}",
            "–" if spread is None else f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})",
        ]


HEAD = ["case", "measured", "without, ms", "added, ms", "ratio"]


def usual(found: Results) -> list[Row]:
    """Return rows of ordinary, settled steps."""
    rows = [
        _step(
            found.steps[title],
            title,
            "`Guard.step` with `SpikeClip`, beside `clip_grad_norm_`",
            arms.OURS,
            CLIP,
        )
        for title in (arms.TRANSFORMER, arms.THOUSAND)
        if title in found.steps
    ]
    for title, rounds in found.turns.items():
        rows.append(_turn(rounds, _trainer(title), "a settled step, beside a bare Trainer", TRAINER))
        rows.append(_turn(rounds, _trainer(title), "a settled step, beside `gradient_clip_val`", CLIPPING))
    return rows


def worst(found: Results) -> list[Row]:
    """Return a row for each case in which a guard costs most."""
    return list(_worst(found))


def _worst(found: Results) -> Iterator[Row]:
    toy, last = "toy of 26 tensors in a Trainer", len(found.first.seconds[OURS][0]) - 1
    yield _turn(found.first.part(slice(0, 1)), toy, "`fit` up to the first step", TRAINER)
    yield _turn(found.first.part(slice(1, 2)), toy, "the first step", TRAINER, label="toy: first step")
    label = f"toy: steps 2 to {last} together"
    yield _sum(found.first.part(slice(2, None)), toy, f"steps 2 to {last}, all together", label)
    said = "a step of a run that diverges, from the first finding on"
    yield _turn(found.diverging, toy, said, TRAINER, label="toy: diverging")
    said = f"a step after {found.plan.fine_tuning[0] // 100 * 100:,}, if the loss has"
    yield _turn(found.not_halved.turns, toy, f"{said} not halved", TRAINER, label="toy: loss not halved")
    yield _turn(found.halved.turns, toy, f"{said} halved", TRAINER, label="toy: loss halved")
    yield from _many(found)
    title, size = found.plan.early[:2]
    said = f"a step from {size.warm_up + TURN} on, beside"
    yield _turn(
        found.early, _trainer(title), f"{said} a bare Trainer", TRAINER, label=f"{_short(title)}: early steps"
    )
    yield _turn(found.early, _trainer(title), f"{said} `gradient_clip_val`", CLIPPING)
    dearest = max(
        ((title, arm) for title in found.steps for arm in found.clipped[title]),
        key=lambda place: found.steps[place[0]].ratio(place[1], CLIP).median,
    )
    toys = [(title, arms.OURS) for title in found.steps if title == arms.TOY]
    for title, arm in dict.fromkeys([dearest, *toys]):
        name = arm.removeprefix("Guard, ")
        said = f"`Guard.step` with `{name}`, beside `clip_grad_norm_`"
        yield _step(found.steps[title], title, said, arm, CLIP, f"{name}, {title.partition(', ')[0]}")
    if found.real.turns:
        id_ = max(found.real.turns, key=lambda id_: found.real.turns[id_].ratio(OURS, TRAINER).median)
        said = f"the dearest, `{id_}`: a step from {FROM} on, beside a bare Trainer"
        yield _turn(
            found.real.turns[id_],
            "models of other packages in a Trainer",
            said,
            TRAINER,
            label=f"{id_}: dearest of other packages",
        )


def _many(found: Results) -> Iterator[Row]:
    count, ours = f"{found.plan.many[0]:,} tensors", many_tensors.OURS
    case = f"{count} in a plain loop"
    made = Spread.of([loop[0] for loop in found.many.seconds[ours]]).median
    yield Row(case, "construction of the guard", None, made, None)
    for steps, said, label in (
        (slice(1, 2), "the first step", "first step"),
        (slice(2, 33), "a step of 2 to 32", "steps 2 to 32"),
    ):
        part = found.many.part(steps)
        yield _turn(part, case, f"{said}, beside a bare norm", BARE, ours)
        yield _turn(part, case, f"{said}, beside `clip_grad_norm_`", CLIP, ours, label=f"{count}: {label}")


def _short(title: str) -> str:
    return title.replace(" million parameters", " million").partition(",")[0]


def _trainer(title: str) -> str:
    return f"transformer in a Trainer, {title}"


def _turn(rounds: Rounds, case: str, measured: str, base: str, arm: str = OURS, label: str = "") -> Row:
    without, added = rounds.step(base).median, rounds.added(arm, base).median
    return Row(case, measured, without, added, rounds.ratio(arm, base), label)


def _sum(rounds: Rounds, case: str, measured: str, label: str) -> Row:
    """Return the row of all steps together."""
    sums = {arm: [[sum(seconds)] for seconds in of_arm] for arm, of_arm in rounds.seconds.items()}
    return _turn(Rounds(sums), case, measured, TRAINER, label=label)


def _step(timings: Timings, case: str, measured: str, arm: str, base: str, label: str = "") -> Row:
    mine, other = timings.step(arm).median, timings.step(base).median
    return Row(case, measured, other, mine - other, timings.ratio(arm, base), label)
