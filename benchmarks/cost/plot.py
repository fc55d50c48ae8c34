"""Picture of the worst cases, of the cost by tensors and parameters, of trainings, and of memory."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.cost import arms, extremes, trainer_arms
from benchmarks.cost.measuring import Rounds
from benchmarks.cost.plan import Results
from lightning_gradguard.cli.cost import BARE, CLIP, Timings

#: Colours of Okabe and Ito, which colour-blind readers can distinguish; markers and dashes help in grey.
STYLES = {
    BARE: {"color": "#56B4E9", "marker": "s", "linestyle": ":"},
    CLIP: {"color": "#E69F00", "marker": "^", "linestyle": "--"},
    arms.OURS: {"color": "#000000", "marker": "o", "linestyle": "-", "linewidth": 2},
}


def picture(found: Results, path: Path) -> None:
    """Draw all six panels."""
    figure, ((added, ratios), (by_tensors, by_elements), (training, memory)) = plt.subplots(
        3, 2, figsize=(11.5, 12), layout="constrained"
    )
    _worst(added, ratios, found)
    _growth(by_tensors, found.by_tensors, "A step, by number of tensors", "tensors of 32 × 32")
    _growth(by_elements, found.by_elements, "A step, by number of parameters", "parameters, in 100 tensors")
    title, rounds = next(iter(found.turns.items()))
    _training(training, rounds, f"A step of the Trainer: {title}")
    _memory(memory, found)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _worst(added: Axes, ratios: Axes, found: Results) -> None:
    """Draw bars of the worst cases, the first on top: milliseconds that a guard adds, and the ratio."""
    rows = [
        row
        for row in reversed(extremes.worst(found))
        if row.label and row.ratio is not None and row.added > 0
    ]
    places = range(len(rows))
    for panel, values, form in (
        (added, [1e3 * row.added for row in rows], "{:,.1f}"),
        (ratios, [row.ratio.median for row in rows if row.ratio is not None], "{:.2f}"),
    ):
        bars = panel.barh(places, values, color="#0072B2", height=0.65)
        panel.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9)
        panel.set_xscale("log")
        panel.set_xlim(min([*values, 2.0]) / 2, 3 * max([*values, 2.0]))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3, axis="x")
        panel.set_axisbelow(True)
    added.set_yticks(places, [row.label for row in rows])
    added.set_title("The worst of it: milliseconds added", loc="right")
    added.set_xlabel("milliseconds, logarithmic")
    ratios.set_yticks(places, [""] * len(rows))
    ratios.set_title("The worst of it: with a guard, over without")
    ratios.set_xlabel("ratio, logarithmic")


def _growth(panel: Axes, column: dict[int, Timings], title: str, label: str) -> None:
    for arm, style in STYLES.items():
        spreads = [timings.step(arm) for timings in column.values()]
        heights = [1e3 * s.median for s in spreads]
        reach = [[1e3 * (s.median - s.low) for s in spreads], [1e3 * (s.high - s.median) for s in spreads]]
        panel.errorbar(list(column), heights, reach, label=arm, capsize=3, **style)
    panel.set(xscale="log", yscale="log", title=title, xlabel=label, ylabel="milliseconds a step")
    _plain(panel)


def _training(panel: Axes, rounds: Rounds, title: str) -> None:
    others = [name for name in rounds.seconds if name != trainer_arms.BARE]
    order = sorted(others, key=lambda name: -rounds.ratio(name, trainer_arms.BARE).median)
    for place, name in enumerate(order):
        spread = rounds.ratio(name, trainer_arms.BARE)
        reach = [[spread.median - spread.low], [spread.high - spread.median]]
        ours = name == trainer_arms.OURS
        style = {"color": "#000000", "marker": "o"} if ours else {"color": "#0072B2", "marker": "D"}
        panel.errorbar([spread.median], [place], xerr=reach, capsize=3, linestyle="none", **style)
    panel.axvline(1, color="#777777", linewidth=1, linestyle="--")
    panel.set_yticks(range(len(order)), order)
    panel.get_yticklabels()[order.index(trainer_arms.OURS)].set_fontweight("bold")
    panel.set_title(title, loc="right")
    panel.set_xlabel("seconds a step, over the bare Trainer")
    panel.grid(alpha=0.3, axis="x")


def _memory(panel: Axes, found: Results) -> None:
    counts = list(found.held)
    panel.plot(
        counts, [found.held[n].total() / 1e6 for n in counts], label="held by a guard", **STYLES[arms.OURS]
    )
    weights = [n * 32 * 32 * 4 / 1e6 for n in counts]
    panel.plot(counts, weights, label="the weights themselves", color="#D55E00", marker="v", linestyle="-.")
    panel.set(xscale="log", yscale="log", title="Memory, by number of tensors")
    panel.set(xlabel="tensors of 32 × 32", ylabel="megabytes")
    _plain(panel)


def _plain(panel: Axes) -> None:
    """Show plain numbers at powers of ten, and at values between where there is space."""
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
        axis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.3, which="both")
    panel.legend()
