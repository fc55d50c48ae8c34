"""Page of the clipping benchmark: tables, sentences and a picture, all computed from the records."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.clipping_tasks.accidents import CORRUPTIONS, REGIMES
from benchmarks.clipping_tasks.pairs import Difference, difference
from benchmarks.clipping_tasks.tasks import TASKS
from benchmarks.clipping_tasks.training import ARMS, BARE, OURS
from benchmarks.clipping_tasks.words import BARE_NOTE, HOW, INTRODUCTION

Run = dict[str, Any]
Cell = tuple[str, str]
#: A run whose loss is further above the best arm's than this part of it has collapsed.
COLLAPSE = 0.25


class Records:
    """Runs of a page, by arm, task, regime and rate.

    Of each task and regime those seeds count that every arm has at every rate, so that a page can be written before all
    runs have ended.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs: dict[tuple[str, str, str], dict[float, dict[int, Run]]] = {}
        for run in runs:
            key = (run["arm"], run["task"], run["regime"])
            self._runs.setdefault(key, {}).setdefault(run["rate"], {})[run["seed"]] = run
        self._seeds = {(task, regime): self._complete((task, regime)) for task in TASKS for regime in REGIMES}
        self.cells = [cell for cell, seeds in self._seeds.items() if seeds]
        self.seeds = sorted({seed for seeds in self._seeds.values() for seed in seeds})
        self.count = sum(len(self._seeds[c]) * len(self.rates(c)) * len(ARMS) for c in self.cells)

    def rates(self, cell: Cell) -> list[float]:
        """Return the rates of a cell, ascending."""
        return sorted(self._runs[(OURS, *cell)])

    def of(self, arm: str, cell: Cell, rate: float, what: str = "loss") -> list[float]:
        """Return one number for each seed."""
        runs = self._runs[(arm, *cell)][rate]
        return [runs[seed][what] for seed in self._seeds[cell]]

    def _complete(self, cell: Cell) -> list[int]:
        """Return the seeds that every arm has at every rate."""
        rates = {rate for arm in ARMS for rate in self._runs.get((arm, *cell), ())}
        found = [set(self._runs.get((arm, *cell), {}).get(rate, ())) for arm in ARMS for rate in rates]
        return sorted(set.intersection(*found)) if found else []

    def mean(self, arm: str, cell: Cell, rate: float, what: str = "loss") -> float:
        """Return the mean over the seeds."""
        return statistics.fmean(self.of(arm, cell, rate, what))

    def best_rate(self, arm: str, cell: Cell) -> float:
        """Return the rate with the lowest mean loss of an arm."""
        return min(self.rates(cell), key=lambda rate: self.mean(arm, cell, rate))

    def best(self, arm: str, cell: Cell) -> float:
        """Return the mean loss of an arm at its own best rate."""
        return self.mean(arm, cell, self.best_rate(arm, cell))

    def best_other(self, cell: Cell) -> str:
        """Return the arm other than ours with the lowest loss at its own best rate."""
        return min((arm for arm in ARMS if arm != OURS), key=lambda arm: self.best(arm, cell))

    def against(self, other: str, cell: Cell) -> Difference:
        """Compare ours with another arm, each at its own best rate."""
        mine, theirs = (self.of(arm, cell, self.best_rate(arm, cell)) for arm in (OURS, other))
        return difference(mine, theirs)

    def gap(self, arm: str, cell: Cell) -> float:
        """Return how far an arm is above the best arm at the rate at which it is furthest."""
        return max(
            self.mean(arm, cell, rate) / min(self.mean(a, cell, rate) for a in ARMS) - 1
            for rate in self.rates(cell)
        )

    def at_the_rate_of_none(self, cell: Cell) -> tuple[float, Difference]:
        """Return the best rate without a clipper, and ours compared with none there."""
        rate = self.best_rate("none", cell)
        return rate, difference(self.of(OURS, cell, rate), self.of("none", cell, rate))


def report(runs: list[Run], extras: Sequence[str] = ()) -> str:
    """Return the page in Markdown.

    Args:
        runs: Records of all arms.
        extras: Sections of their own, such as that of the long runs.
    """
    records = Records([run for run in runs if run["arm"] in ARMS])
    facts = {
        "ours": OURS,
        "seeds": ", ".join(map(str, records.seeds)),
        "runs": f"{records.count:,}",
        "extent": "the full set of runs" if len(records.seeds) == 5 else f"{len(records.seeds)} seeds",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tasks": "\n".join(
            f"| {task.title} | {task.steps} | {min(task.rates):g} to {max(task.rates):g} |"
            for task in TASKS.values()
        ),
        "corruptions": "; ".join(_as_clause(c.__doc__ or "") for c in CORRUPTIONS),
    }
    parts = [
        INTRODUCTION.format(**facts),
        "## In short",
        _verdict(records),
        f"## {OURS} beside the best other arm\n\nEach at its own best rate; the interval is the 95 % confidence "
        "interval over paired seeds.",
        _summary(records),
        "![Loss by learning rate](clipping.png)",
        "## Every arm at its own best rate\n\nHeld-out loss, mean over the seeds; the lowest of a row is bold.",
        _losses(records),
        "## Worst gap over all rates\n\nHow far an arm lies above the best arm at the rate at which it is furthest "
        "from it: what a rate chosen wrongly costs.",
        _gaps(records),
        "## Share of steps clipped\n\nAt the arm's own best rate.",
        _clipped(records),
        *extras,
        "## Without a guard",
        BARE_NOTE,
        _bare(runs),
        HOW.format(**facts),
        "## Loss by rate",
        _by_rate(records),
    ]
    return "\n\n".join(parts) + "\n"


def picture(runs: list[Run], path: Path) -> None:
    """Draw the held-out loss by learning rate: a row for each task, a column for each regime."""
    records = Records([run for run in runs if run["arm"] in ARMS])
    tasks = list(dict.fromkeys(task for task, _ in records.cells))
    figure, panels = plt.subplots(
        len(tasks),
        len(REGIMES),
        figsize=(12, 2.6 * len(tasks)),
        squeeze=False,
        sharex="row",
        layout="constrained",
    )
    for row, task in zip(panels, tasks, strict=True):
        for panel, regime in zip(row, REGIMES, strict=True):
            if (task, regime) not in records.cells:
                panel.set_axis_off()
                continue
            _panel(panel, records, (task, regime))
        row[0].set_ylabel(TASKS[task].title.replace(", ", "\n"), fontsize=8)
    panels[0, -1].legend(fontsize=7)
    figure.supxlabel("peak learning rate")
    figure.supylabel("held-out loss")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _panel(panel: Any, records: Records, cell: Cell) -> None:
    for number, arm in enumerate(ARMS):
        heights = [records.mean(arm, cell, rate) for rate in records.rates(cell)]
        style: Any = {"color": f"C{number}"}
        if arm == OURS:
            style = {"linewidth": 2.5, "color": "black", "zorder": 3}
        panel.plot(records.rates(cell), heights, label=arm, marker="o", markersize=2, **style)
    lowest = min(records.best(arm, cell) for arm in ARMS)
    panel.set_ylim(0.97 * lowest, 1.6 * lowest)
    panel.set(xscale="log", title=cell[1])
    panel.grid(alpha=0.3)


def _as_clause(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:].rstrip(".")


def _verdict(records: Records) -> str:
    """Return what the tables say, as a list."""
    cells = records.cells
    others = {cell: records.against(records.best_other(cell), cell) for cell in cells}
    near = [c for c in cells if others[c].mean <= 0.01 or others[c].is_noise]
    behind = [c for c in cells if c not in near]
    corrupt = [c for c in cells if c[1] == "corrupt"]
    better = [c for c in corrupt if (d := records.against("none", c)).mean < 0 and not d.is_noise]
    sane = {c: records.at_the_rate_of_none(c)[1] for c in cells if c[1] == "clean"}
    hurt = [c for c, d in sane.items() if d.mean > 0.01 and not d.is_noise]
    adaptive = [c for c in cells if TASKS[c[0]].adaptive]
    collapsed = [
        c for c in cells if records.best(OURS, c) > (1 + COLLAPSE) * min(records.best(a, c) for a in ARMS)
    ]
    lines = [
        f"At its own best rate, `{OURS}` is within 1 % of the best other arm, or within seed noise of it, in "
        f"{len(near)} of {len(cells)} pairs of task and regime{_which(behind)}. It is the lowest in "
        f"{sum(d.mean < 0 for d in others.values())} of them; "
        + "; ".join(
            f"`{arm}` in {sum(records.best_other(c) == arm and others[c].mean >= 0 for c in cells)}"
            for arm in ARMS
            if arm != OURS and any(records.best_other(c) == arm and others[c].mean >= 0 for c in cells)
        )
        + ".",
        f"It is significantly better than no clipper in {len(better)} of {len(corrupt)} tasks with corrupt batches"
        f"{_which([c for c in corrupt if c not in better])}.",
        f"At the rate that is best without a clipper, a clean run is significantly worse than without one, by over "
        f"1 %, in {len(hurt)} of {len(sane)} tasks{_which(hurt, '')}.",
        _gap_sentence(records, adaptive),
        f"It collapses at its own best rate, more than {COLLAPSE:.0%} above the best arm, in {len(collapsed)} of "
        f"{len(cells)} pairs{_which(collapsed, '')}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _gap_sentence(records: Records, cells: list[Cell]) -> str:
    worst = {arm: max((records.gap(arm, c) for c in cells), default=0.0) for arm in ARMS}
    ranked = sorted(worst, key=worst.__getitem__)
    mean = {arm: statistics.fmean([records.gap(arm, c) for c in cells] or [0.0]) for arm in ARMS}
    return (
        f"With adaptive optimizers, over all rates, its worst gap to the best arm is {worst[OURS]:.0%} (mean of the "
        f"tasks' worst gaps {mean[OURS]:.0%}), place {ranked.index(OURS) + 1} of {len(ranked)}; "
        + ", ".join(f"`{arm}` {worst[arm]:.0%} ({mean[arm]:.0%})" for arm in ranked if arm != OURS)
        + "."
    )


def _which(cells: Sequence[Cell], word: str = "not: ") -> str:
    return f" ({word}{', '.join(f'{task} {regime}' for task, regime in cells)})" if cells else ""


def _summary(records: Records) -> str:
    rows = []
    for cell in records.cells:
        other = records.best_other(cell)
        sane = ""
        if cell[1] == "clean":
            rate, at = records.at_the_rate_of_none(cell)
            sane = f"{at} at {rate:g}"
        rows.append(
            [
                cell[0],
                cell[1],
                f"{records.best(OURS, cell):.3f}",
                f"{other} {records.best(other, cell):.3f}",
                str(records.against(other, cell)),
                str(records.against("none", cell)),
                sane,
            ]
        )
    head = [
        "task",
        "regime",
        OURS,
        "best other",
        "ours relative to it",
        "ours relative to none",
        "at none's best rate",
    ]
    return table(head, rows)


def _by_cell(records: Records, number: Any, form: str) -> str:
    rows = []
    for cell in records.cells:
        values = {arm: number(arm, cell) for arm in ARMS}
        lowest = min(values.values())
        texts = [format(v, form) for v in values.values()]
        rows.append(
            [
                *cell,
                *(f"**{t}**" if v == lowest else t for v, t in zip(values.values(), texts, strict=True)),
            ]
        )
    return table(["task", "regime", *ARMS], rows)


def _losses(records: Records) -> str:
    return _by_cell(records, records.best, ".3f")


def _gaps(records: Records) -> str:
    return _by_cell(records, records.gap, ".0%")


def _clipped(records: Records) -> str:
    rows = [
        [
            *cell,
            *(f"{records.mean(arm, cell, records.best_rate(arm, cell), 'clipped'):.0%}" for arm in ARMS),
        ]
        for cell in records.cells
    ]
    return table(["task", "regime", *ARMS], rows)


def _by_rate(records: Records) -> str:
    parts = []
    for cell in records.cells:
        rates = records.rates(cell)
        lowest = {rate: min(records.mean(arm, cell, rate) for arm in ARMS) for rate in rates}
        rows = []
        for arm in ARMS:
            means = [records.mean(arm, cell, rate) for rate in rates]
            cells = [
                f"**{m:.3f}**" if m == lowest[r] else f"{m:.3f}" for r, m in zip(rates, means, strict=True)
            ]
            rows.append([arm, *cells])
        parts.append(f"### {cell[0]}, {cell[1]}\n\n" + table(["", *(f"{rate:g}" for rate in rates)], rows))
    return "\n\n".join(parts)


def _bare(runs: list[Run]) -> str:
    rows = [
        [run["task"], run["arm"], f"{run['loss']:.3f}", f"{run['start']:.3f}"]
        for run in runs
        if run["arm"] in BARE
    ]
    return table(["task", "arm", "held-out loss", "before the first step"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
