"""Page of the cost benchmark: tables and sentences, all computed from the results."""

from __future__ import annotations

import platform
import statistics
import textwrap

import torch

from benchmarks.cost import arms, extremes, many_tensors, peers, toy, trainer_arms
from benchmarks.cost.measuring import Rounds
from benchmarks.cost.plan import SMALL, Results
from benchmarks.cost.real_turns import FROM
from benchmarks.cost.turns import TURN
from lightning_gradguard.cli.cost import BARE, CLIP, CYCLE, WARM_UP, Spread

INTRODUCTION = """# What a guard costs

Made by `python benchmarks/overhead.py`: Python {python}, torch {torch}, CPU, {threads} thread{s}, {clock}.
`gradguard cost package.module:make_model` measures the first table on a model of your own.

Arms are interleaved in one process. A ratio is taken within each round, in which both arms found the same machine; what
stands here is the median of the ratios, with the quartiles in brackets."""

WORST = """## The worst of it

Where a guard costs most: first steps, faults, losses that do not fall, short steps, many tensors. In a Trainer it is
`GradGuard(clipper=SpikeClip())` and `GradHistogram()`, both on their defaults, from the start of a batch to the start
of the next. The toy has {layers} layers of 64 × 64 and Adam; trainings with and without callbacks follow each other on
the same batches, from the same weights, and steps are compared one by one. First steps are those of a process that has
trained before: what is done only once in a process, such as imports, is left out.

{said}"""

USUAL = """## The usual

The same columns, of steps after the first {settled} in trainings that go well."""

STEPS = """## A step

`Guard.step` on quiet steps beside one norm of all gradients, which any judgement of them needs, and torch's
`clip_grad_norm_`, in shuffled order. Each arm finds gradients that a backward pass has just made as new tensors, and
caches that other memory has gone through. Before the clock counts, guards have judged {settled} steps; from there on
one reads weights, and looks closer, in one of {cycle} steps. Figures are means over such a cycle, of the median of each
of its steps, so that the costly ones count; the median step is beside them. Peers are called as their pages say, as far
as their part of a step can be called by itself."""

CLIPPERS = """### All clippers

The same steps. `NormClip` has a limit that no norm reaches; the others clip what they clip, and a step that is clipped
also writes the gradients. `AGC` does what timm's `adaptive_clip_grad` does, which is its last column."""

MANY = """## Many tensors, from the first step on

A plain loop over {count:,} tensors of 32 × 32 with a new guard, `Guard(model.named_parameters(), clipper=SpikeClip())`.
Medians over {loops}."""

EARLY = """### From the first steps on

A transformer of {title}, by turns in {trainings}: steps {begin} to {end} of a guard, of which one in eight is
evaluated in full."""

REAL = """## Models of other packages

Healthy trainings of `benchmarks/real_models.py`, one of each family of models. A bare Trainer and one with our
callbacks take turns of {turn} steps, from a guard's step {begin} on, while one step of eight is evaluated in full.
Trainings of few steps are repeated with other seeds."""

TURNS = """## A training

One `Trainer.fit` of a small transformer, in which arms take turns of {turn} steps: callbacks and clipping are put in
and taken out, so that all find the same machine, weights and memory. From the start of a batch to the start of the
next, after {warm_up} steps with ours: the median over rounds of one turn each. Ours is `GradGuard(clipper=SpikeClip())`
and `GradHistogram()`, both on their defaults, with histograms, scalars and pictures going to TensorBoard. One step in
100 draws histograms, most of which the median leaves out; `benchmarks/histograms.md` has their cost. What a guard adds
is nearly the same whatever the model, and so a smaller part of a longer step."""

TRAININGS = """## Whole trainings, with others

Peers that cannot take turns. Every arm by itself, in rotation: the mean over {steps} steps after the first {warm_up},
of each step's median over the rounds. In these steps the loss is logged to TensorBoard {logged} times, and histograms
are written once by all that draw some. Trainings that are minutes apart do not find the same machine, so that a few
percent mean nothing."""

GROWTH = """## Growth

`Guard.step` with `SpikeClip` on more tensors, of 32 × 32 each, and on more parameters, in 100 tensors."""


def report(found: Results, clock: str, picture: str) -> str:
    """Return the page in Markdown.

    Args:
        found: Results to report.
        clock: Which seconds were counted.
        picture: File name of the picture beside the page.
    """
    threads = torch.get_num_threads()
    head = INTRODUCTION.format(
        python=platform.python_version(),
        torch=torch.__version__,
        threads=threads,
        s="s" if threads > 1 else "",
        clock=clock,
    )
    parts = [head, f"![Cost of the worst cases, of steps, trainings and memory]({picture})"]
    parts += [
        _said_of_the_worst(found),
        table(extremes.HEAD, [row.cells for row in extremes.worst(found)]),
        USUAL.format(settled=WARM_UP),
        table(extremes.HEAD, [row.cells for row in extremes.usual(found)]),
        STEPS.format(cycle=CYCLE, settled=WARM_UP),
        _steps(found),
        _said_of_steps(found),
        CLIPPERS,
        _clippers(found),
        _said_of_agc(found),
        *_many(found),
        TURNS.format(turn=TURN, warm_up=SMALL.warm_up),
        _turns(found),
        *(_rank(rounds) for rounds in found.turns.values()),
        *_early(found),
        *_real(found),
        TRAININGS.format(steps=SMALL.steps, warm_up=SMALL.warm_up, logged=SMALL.steps // 50),
    ]
    for title, rounds in found.trainings.items():
        count = len(next(iter(rounds.seconds.values())))
        parts += [f"### {title}, {_number(count, 'round')}", _training(rounds)]
    parts.append(f"The guards found {found.findings or 'nothing'} in these trainings.")
    parts += [_versions(), GROWTH, _growth(found), "## Memory", _memory(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _steps(found: Results) -> str:
    rows = []
    for title, timings in found.steps.items():
        for arm in timings.seconds:
            if arm in arms.CLIPPERS:
                continue
            step = timings.step(arm)
            rows.append(
                [
                    title,
                    arm,
                    f"{1e3 * step.median:.2f}",
                    f"{1e3 * timings.median(arm):.2f}",
                    _spread(timings.ratio(arm, BARE)),
                    _spread(timings.ratio(arm, CLIP)),
                ]
            )
    return table(
        ["gradients", "arm", "ms", "median step, ms", "over bare norm", "over `clip_grad_norm_`"], rows
    )


def _said_of_steps(found: Results) -> str:
    few, many = (found.steps[title].step(arms.OURS).median for title in (arms.THOUSAND, arms.FOUR_THOUSAND))
    counts = [found.shapes[title][0] for title in (arms.THOUSAND, arms.FOUR_THOUSAND)]
    each = 1e6 * few / counts[0], 1e6 * many / counts[1]
    disturbed = sum(t.findings for t in found.steps.values())
    clipped = max(t.clipped for t in found.steps.values())
    return (
        f"A tensor costs {each[0]:.2f} µs among {counts[0]:,} and {each[1]:.2f} µs among {counts[1]:,}, "
        f"{each[1] / each[0]:.2f} times as much. The guards found {disturbed or 'nothing'} in these steps, and clipped "
        f"{clipped:.0%} of them."
    )


def _said_of_the_worst(found: Results) -> str:
    steps = len(found.diverging.seconds[trainer_arms.OURS][0])
    said = "Where it was to diverge, the guard found nothing."
    if found.faults:
        said = (
            f"Where it diverges, its learning rate grows from step {toy.BEGIN} on; from the first finding on the "
            f"{_number(steps, 'step')} that all trainings reached are counted. Found there: {_list(found.faults)}."
        )
    left = 100 * (1 - found.not_halved.share), 100 * (1 - found.halved.share)
    said += (
        f" The loss that has not halved is that of the same training with a constant added: it ended {left[0]:.1f} % "
        f"below its start, the other {left[1]:.1f} %."
    )
    return WORST.format(layers=toy.LAYERS, said="\n".join(textwrap.wrap(said, 120)))


def _clippers(found: Results) -> str:
    rows = []
    for title, timings in found.steps.items():
        for arm, clipped in found.clipped[title].items():
            rows.append(
                [
                    title,
                    f"`{arm.removeprefix('Guard, ')}`",
                    f"{1e3 * timings.step(arm).median:.2f}",
                    f"{clipped:.0%}",
                    _spread(timings.ratio(arm, BARE)),
                    _spread(timings.ratio(arm, CLIP)),
                    _spread(timings.ratio(arm, arms.AGC_THERE))
                    if arm == arms.AGC_HERE and arms.AGC_THERE in timings.seconds
                    else "–",
                ]
            )
    head = [
        "gradients",
        "clipper",
        "ms",
        "clipped",
        "over bare norm",
        "over `clip_grad_norm_`",
        "over timm's",
    ]
    return table(head, rows)


def _said_of_agc(found: Results) -> str:
    ratios = {
        title: timings.ratio(arms.AGC_HERE, arms.AGC_THERE).median
        for title, timings in found.steps.items()
        if arms.AGC_THERE in timings.seconds
    }
    if not ratios:
        return ""
    dearest = max(ratios, key=lambda title: ratios[title])
    dearer = sum(ratio > 1 for ratio in ratios.values())
    return (
        f"Ours takes longer than timm's on {dearer} of these {len(ratios)}; at worst {ratios[dearest]:.2f} times as "
        f"long, on {dearest}."
    )


def _many(found: Results) -> list[str]:
    count, steps, loops = found.plan.many
    ours = many_tensors.OURS
    made = Spread.of([loop[0] for loop in found.many.seconds[ours]])
    parts = {
        "the first step": (1, 2),
        "a step of 2 to 32": (2, 33),
        f"a step of 33 to {steps}": (33, steps + 1),
    }
    rows = [["construction", f"{1e3 * made.median:.2f}", "–", "–", "–"]]
    for what, (begin, end) in parts.items():
        part = found.many.part(slice(begin, end))
        rows.append(
            [
                what,
                f"{1e3 * part.step(ours).median:.2f}",
                f"{1e3 * statistics.median(map(statistics.median, part.seconds[ours])):.2f}",
                _spread(part.ratio(ours, BARE)),
                _spread(part.ratio(ours, CLIP)),
            ]
        )
    head = [f"{count:,} tensors", "mean, ms", "median step, ms", "over bare norm", "over `clip_grad_norm_`"]
    return [MANY.format(count=count, loops=_number(loops, "loop")), table(head, rows)]


def _early(found: Results) -> list[str]:
    title, size, turns, trainings = found.plan.early
    begin, end = size.warm_up + TURN, size.warm_up + (turns + 1) * TURN
    said = EARLY.format(title=title, begin=begin, end=end, trainings=_number(trainings, "training"))
    return [said, _turn_table({title: found.early})]


def _real(found: Results) -> list[str]:
    if not found.real.turns and not found.real.absent:
        return []
    rows = [
        [
            f"`{id_}`{'' if found.real.clipped[id_] else ' ¹'}",
            f"{case.title} ({case.package} {case.version})",
            f"{found.real.tensors[id_]}",
            f"{1e3 * rounds.step(trainer_arms.BARE).median:.2f}",
            f"{1e3 * rounds.added(trainer_arms.OURS, trainer_arms.BARE).median:.2f}",
            _spread(rounds.ratio(trainer_arms.OURS, trainer_arms.BARE)),
        ]
        for id_, rounds in found.real.turns.items()
        for case in [found.real.cases[id_]]
    ]
    parts = [REAL.format(turn=TURN, begin=FROM)]
    if rows:
        parts.append(table(["case", "model", "tensors", "bare, ms", "added, ms", "over bare"], rows))
        ratios, added = (
            [getattr(r, name)(trainer_arms.OURS, trainer_arms.BARE).median for r in found.real.turns.values()]
            for name in ("ratio", "added")
        )
        parts.append(
            f"Over all {len(ratios)}, a step takes {statistics.median(ratios):.2f} times as long in the median, and at "
            f"worst {max(ratios):.2f} times; {1e3 * statistics.median(added):.2f} ms are added, at most "
            f"{1e3 * max(added):.2f}."
        )
    if not all(found.real.clipped.values()):
        parts.append("¹ Without a clipper, since the Trainer itself clips there.")
    if found.real.failed:
        parts.append(
            "Not measured: " + "; ".join(f"`{i}`: {why}" for i, why in found.real.failed.items()) + "."
        )
    if found.real.absent:
        parts.append(
            f"Left out, since their packages are not installed: models of {', '.join(found.real.absent)}."
        )
    return parts


def _turns(found: Results) -> str:
    return _turn_table(found.turns)


def _turn_table(turns: dict[str, Rounds]) -> str:
    rows = [
        [
            title,
            f"**{name}**" if name == trainer_arms.OURS else name,
            trainer_arms.EVERY[name].does,
            f"{1e3 * rounds.step(name).median:.1f}",
            _spread(rounds.ratio(name, trainer_arms.BARE), digits=3),
            _spread(rounds.ratio(name, trainer_arms.CLIP), digits=3),
        ]
        for title, rounds in turns.items()
        for name in rounds.seconds
    ]
    return table(["model", "arm", "what it does", "ms a step", "over bare", "over `gradient_clip_val`"], rows)


def _training(rounds: Rounds) -> str:
    rows = [
        [
            f"**{name}**" if name == trainer_arms.OURS else name,
            trainer_arms.EVERY[name].does,
            f"{1e3 * rounds.step(name).median:.1f}",
            _spread(rounds.ratio(name, trainer_arms.BARE), digits=3),
            f"{rounds.usual(name, trainer_arms.BARE):.3f}",
            _spread(rounds.ratio(name, trainer_arms.CLIP), digits=3),
        ]
        for name in rounds.seconds
    ]
    head = [
        "arm",
        "what it does",
        "ms a step",
        "over bare",
        "median step, over bare",
        "over `gradient_clip_val`",
    ]
    return table(head, rows)


def _rank(rounds: Rounds) -> str:
    """Return our rank among arms that check every gradient at every step."""
    looking = [name for name in rounds.seconds if trainer_arms.EVERY[name].each_step]
    if len(looking) < 3:
        return ""
    order = sorted(looking, key=lambda name: rounds.ratio(name, trainer_arms.BARE).median)
    place = order.index(trainer_arms.OURS) + 1
    return (
        f"Of the {len(order)} here that look at all gradients at every step, ours is number {place}; "
        f"from cheapest to dearest: {', '.join(order)}."
    )


def _versions() -> str:
    there = [
        f"{name} ({peers.PACKAGES[name][0]} {peers.version(name)})"
        for name in peers.PACKAGES
        if peers.find(name)
    ]
    missing = [f"{name} (`pip install --no-deps {peers.PACKAGES[name][0]}`)" for name in peers.absent()]
    lines = [f"Peers, as installed: {', '.join(there)}."] if there else []
    lines += [f"Left out, since they are not installed: {', '.join(missing)}."] if missing else []
    return " ".join(lines)


def _growth(found: Results) -> str:
    rows = [
        [what, f"{count:,}", *(f"{1e3 * timings.step(arm).median:.2f}" for arm in (BARE, CLIP, arms.OURS))]
        for what, column in (("tensors", found.by_tensors), ("parameters", found.by_elements))
        for count, timings in column.items()
    ]
    return table(["of", "number", f"{BARE}, ms", f"`{CLIP}`, ms", f"{arms.OURS}, ms"], rows)


def _memory(found: Results) -> str:
    held = found.held[found.reference]
    counts = sorted(found.held)
    rows = [[f"`{name}`", f"{size / 1e3:,.0f}"] for name, size in held.most_common() if size >= 1000]
    rows.append(["all", f"{held.total() / 1e3:,.0f}"])
    per = [found.held[n].total() / n for n in counts]
    return (
        f"A guard with the default detectors and SpikeClip over {found.reference:,} tensors of 32 × 32 holds "
        f"{held.total() / 1e6:.2f} MB, {found.held_tensors / 1e6:.2f} MB of it in torch's tensors; over as many of "
        f"64 × 64, {found.held_wide / 1e6:.2f} MB. From {counts[0]:,} to {counts[-1]:,} tensors it is {min(per):,.0f} "
        f"to {max(per):,.0f} bytes a tensor. Python's objects and arrays, the history among them, are "
        f"{found.python / 1e6:.2f} MB. By holder:\n\n" + table(["attribute of `Guard`", "kB"], rows)
    )


def _spread(spread: Spread, digits: int = 2) -> str:
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}–{spread.high:.{digits}f})"


def _list(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    first, *others = ("| " + " | ".join(line) + " |" for line in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *others])
