"""Page of the clipping benchmark: tables, sentences and a picture, all computed from the records."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.lm.regimes import CORRUPTIONS, REGIMES
from benchmarks.lm.text import library
from benchmarks.lm.training import ARMS, BARE, BATCH
from benchmarks.lm.words import BARE_NOTE, HOW, INTRODUCTION

Run = dict[str, Any]
OURS = "SpikeClip"
#: A rate is stable if no seed ends further than this above the best mean loss of the clean run without a clipper.
STABLE = 1.10
TRIED = Path(__file__).with_name("tried.md")


class Records:
    """Runs of a page, by arm, regime and rate."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = list(runs)
        self.rates = sorted({run["rate"] for run in self.runs})
        self.seeds = sorted({run["seed"] for run in self.runs})
        self.steps = max(run["steps"] for run in self.runs)

    def of(self, arm: str, regime: str, rate: float, what: str) -> list[float]:
        """Return one number per seed."""
        wanted = (arm, regime, rate)
        return [run[what] for run in self.runs if (run["arm"], run["regime"], run["rate"]) == wanted]

    def mean(self, arm: str, regime: str, rate: float, what: str = "loss") -> float:
        """Return the mean over the seeds."""
        return statistics.fmean(self.of(arm, regime, rate, what))

    def spread(self, arm: str, regime: str, rate: float) -> float:
        """Return the standard deviation of the loss over the seeds."""
        losses = self.of(arm, regime, rate, "loss")
        return statistics.stdev(losses) if len(losses) > 1 else 0.0

    def best_other(self, regime: str, rate: float) -> str:
        """Return the arm with the lowest mean loss, without ours."""
        return min((arm for arm in ARMS if arm != OURS), key=lambda arm: self.mean(arm, regime, rate))

    def highest_stable(self, arm: str, regime: str) -> float | None:
        """Return the highest rate up to which every rate is stable."""
        bar = STABLE * min(self.mean("none", "clean", rate) for rate in self.rates)
        highest = None
        for rate in self.rates:
            if not all(loss <= bar for loss in self.of(arm, regime, rate, "loss")):
                break
            highest = rate
        return highest


def report(runs: list[Run]) -> str:
    """Return the page in Markdown."""
    records = Records(runs)
    facts = {
        "steps": records.steps,
        "seeds": len(records.seeds),
        "tokens": f"{len(library().train):,}",
        "batch": BATCH,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corruptions": "; ".join(_as_clause(c.__doc__ or "") for c in CORRUPTIONS),
    }
    parts = [INTRODUCTION.format(**facts), _summary(records), "![Loss by learning rate](clipping.png)"]
    for regime, words in REGIMES.items():
        parts += [f"## Regime {regime}: {words}", _losses(records, regime), _behaviour(records, regime)]
    parts += [
        "## Highest stable learning rate",
        _stability(records),
        "## Without a guard",
        BARE_NOTE,
        _bare(records),
    ]
    parts.append(HOW.format(**facts))
    if TRIED.exists():
        parts.append(TRIED.read_text().strip())
    return "\n\n".join(parts) + "\n"


def picture(runs: list[Run], path: Path) -> None:
    """Draw the held-out loss by learning rate, one panel per regime."""
    records = Records(runs)
    figure, panels = plt.subplots(1, len(REGIMES), figsize=(12, 3.8), sharey=True, layout="constrained")
    for panel, regime in zip(panels, REGIMES, strict=True):
        for number, arm in enumerate(ARMS):
            heights = [records.mean(arm, regime, rate) for rate in records.rates]
            errors = [records.spread(arm, regime, rate) for rate in records.rates]
            strong = (
                {"linewidth": 2.5, "color": "black", "zorder": 3} if arm == OURS else {"color": f"C{number}"}
            )
            panel.errorbar(
                records.rates, heights, errors, label=arm, marker="o", markersize=3, capsize=2, **strong
            )
        panel.set(xscale="log", xlabel="peak learning rate", title=regime)
        panel.set_xticks(records.rates, [f"{rate:g}" for rate in records.rates])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss, nats per token")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _as_clause(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:].rstrip(".")


def _summary(records: Records) -> str:
    rows = []
    for regime in REGIMES:
        for rate in records.rates:
            mine, none = (records.mean(arm, regime, rate) for arm in (OURS, "none"))
            other = records.best_other(regime, rate)
            best = records.mean(other, regime, rate)
            spread = records.spread(OURS, regime, rate)
            rows.append(
                [
                    regime,
                    f"{rate:g}",
                    f"{mine:.3f} ± {spread:.3f}",
                    f"{none:.3f} ({mine / none - 1:+.1%})",
                    f"{other} {best:.3f} ({mine / best - 1:+.1%})",
                ]
            )
    head = [
        "regime",
        "rate",
        "SpikeClip",
        "none (SpikeClip relative to it)",
        "best other (SpikeClip relative to it)",
    ]
    return "## SpikeClip beside the best of the others\n\n" + _verdict(records) + "\n\n" + table(head, rows)


def _verdict(records: Records) -> str:
    cells = [(regime, rate) for regime in REGIMES for rate in records.rates]
    over = [records.mean(OURS, *c) / records.mean(records.best_other(*c), *c) - 1 for c in cells]
    sane = min(records.rates, key=lambda rate: records.mean("none", "clean", rate))
    mine, none = (records.of(arm, "clean", sane, "loss") for arm in (OURS, "none"))
    difference = statistics.fmean(mine) - statistics.fmean(none)
    sentences = [
        f"Of {len(cells)} pairs of regime and rate, SpikeClip is the lowest in {sum(o < 0 for o in over)}, at most 1 % "
        f"above the best other arm in {sum(o <= 0.01 for o in over)}, and at worst {max(over):.1%} above it.",
        f"At the rate that is best without a clipper, {sane:g}, it clips "
        f"{records.mean(OURS, 'clean', sane, 'clipped'):.1%} of the steps of a clean run and changes its loss by "
        f"{difference:+.4f}, where seeds differ by {records.spread('none', 'clean', sane):.4f}.",
    ]
    return " ".join(sentences)


def _losses(records: Records, regime: str) -> str:
    lowest = {r: min(records.mean(arm, regime, r) for arm in ARMS) for r in records.rates}

    def cell(arm: str, rate: float) -> str:
        mean = records.mean(arm, regime, rate)
        text = f"{mean:.3f} ± {records.spread(arm, regime, rate):.3f}"
        return f"**{text}**" if mean == lowest[rate] else text

    head = ["held-out loss", *(f"rate {rate:g}" for rate in records.rates)]
    return table(head, [[arm, *(cell(arm, rate) for rate in records.rates)] for arm in ARMS])


def _behaviour(records: Records, regime: str) -> str:
    def cell(arm: str, rate: float) -> str:
        clipped, score = (records.mean(arm, regime, rate, what) for what in ("clipped", "score"))
        return f"{clipped:.1%} / {score:.2%}"

    head = ["steps clipped / spike score", *(f"rate {rate:g}" for rate in records.rates)]
    return table(head, [[arm, *(cell(arm, rate) for rate in records.rates)] for arm in ARMS])


def _stability(records: Records) -> str:
    def cell(arm: str, regime: str) -> str:
        rate = records.highest_stable(arm, regime)
        return "none of them" if rate is None else f"{rate:g}"

    bar = STABLE * min(records.mean("none", "clean", rate) for rate in records.rates)
    note = (
        f"The highest rate up to which every seed ends below {bar:.3f}: {STABLE - 1:.0%} above the best mean loss "
        "of a clean run without a clipper."
    )
    rows = [[arm, *(cell(arm, regime) for regime in REGIMES)] for arm in ARMS]
    return note + "\n\n" + table(["", *REGIMES], rows)


def _bare(records: Records) -> str:
    runs = [run for run in records.runs if run["arm"] in BARE]
    return table(["arm", "held-out loss"], [[run["arm"], f"{run['loss']:.3f}"] for run in runs])


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
