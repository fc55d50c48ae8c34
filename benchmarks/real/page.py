"""Page of `benchmarks/real_models.py`: scores of the runs, and tables of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.real.case import Model

WARNING = 1

_OPENING = """\
# Models that others wrote

Ordinary trainings of models from packages that others maintain, small and with generated data, under
`GradGuard(policy=Policy.strict(), trials=True)`: every critical fault halts, and the check-up of the first batch counts
as well. Nothing should be said of a training that learns. Made by `python benchmarks/real_models.py`.
"""

_HEALTHY = """\
## Healthy trainings

"Learned" is judged without the guard's help, by the loss (medians of the first 5 and the last 20 steps) or, where a
criterion says "reaches", by a score on new data. "Said" counts warnings of all kinds over all seeds, the check-up's
included. "Order": layers that an expert can name stand in the order from input to output. "Same": the run without a
guard had the same losses, to the bit.
"""

_BROKEN = """\
## Broken trainings

The same, with one mistake each. None of them meets its criterion. "Fault" and "cause": the first warning names a
fault, and the diagnosis first a cause, that an expert would name; where no fault fits the mistake, a message names it.
"""


def right_fault(case: Model, run: Mapping[str, Any]) -> bool:
    """Return True if the first warning names an acceptable fault, or a message says what is wrong."""
    warnings = [f for f in run["findings"] if f["severity"] >= WARNING]
    if warnings and warnings[0]["fault"] in [fault.value for fault in case.faults]:
        return True
    return any(word in text(run) for word in case.said)


def right_cause(case: Model, run: Mapping[str, Any]) -> bool:
    """Return True if the first cause is acceptable; without a diagnosis, if a message names it."""
    if run["causes"]:
        return run["causes"][0] in [cause.value for cause in case.causes]
    return any(cause.value.replace("_", " ") in text(run) for cause in case.causes)


def text(run: Mapping[str, Any]) -> str:
    """Return all that was said in a run, in lower case."""
    return " ".join([*run["said"], *(run["checkup"] or ()), run["diagnosis"] or ""]).lower()


def alarms(run: Mapping[str, Any]) -> int:
    """Return the number of warnings: of faults, and of mistakes and check-ups."""
    return max(run["warnings"], len(run["said"])) + bool(run["halted"] and not run["said"])


def page(cases: Sequence[Model], runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the page as Markdown.

    Args:
        cases: Cases in the order of the tables; those without a run are listed as not run.
        runs: Records of `benchmarks.real.watching.watch`.
    """
    guarded: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    bare: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        if run.get("strict", True):
            guarded[run["case"]].append(run)
        else:
            bare[run["case"]] = run
    healthy = [c for c in cases if not c.broken]
    broken = [c for c in cases if c.broken]
    absent = [c.id for c in cases if not guarded[c.id]]
    parts = [_OPENING]
    if any(guarded[c.id] for c in healthy):
        parts += [_HEALTHY, _totals(healthy, guarded), _healthy_table(healthy, guarded, bare)]
        parts += [_said(healthy, guarded)]
    if any(guarded[c.id] for c in broken):
        parts += [_BROKEN, _broken_table(broken, guarded, bare)]
    if absent:
        parts.append(f"Not run here: {', '.join(absent)}.\n")
    return "\n".join(part for part in parts if part)


def _totals(cases: Sequence[Model], guarded: Mapping[str, list[Mapping[str, Any]]]) -> str:
    ran = [c for c in cases if guarded[c.id]]
    learned = sum(_learned(guarded[c.id]) for c in ran)
    noisy = sum(any(map(_is_noisy, guarded[c.id])) for c in ran)
    halted = sum(any(run.get("halted") for run in guarded[c.id]) for c in ran)
    ordered = [c for c in ran if c.order]
    right = sum(all(run.get("ordered") for run in guarded[c.id]) for c in ordered)
    packages = len({c.package for c in ran})
    return (
        f"**{len(ran)} models of {packages} packages: {learned} learned, {noisy} with a false alarm, "
        f"{halted} halted; order right in {right} of {len(ordered)}.**\n"
    )


def _healthy_table(
    cases: Sequence[Model],
    guarded: Mapping[str, list[Mapping[str, Any]]],
    bare: Mapping[str, Mapping[str, Any]],
) -> str:
    lines = [
        "| case | model | package | parameters | steps | learned | said | halted | order | same |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | --- | --- | --- |",
    ]
    for case in cases:
        runs = guarded[case.id]
        if not runs:
            continue
        first = runs[0]
        if first.get("error"):
            lines.append(
                f"| {case.id} | {case.title} | {case.package} | failed: {_last_line(first['error'])} |"
            )
            continue
        halts = [run["halted"] for run in runs if run["halted"]]
        course = f"{_number(first['from'])} to {_number(first['to'])}{'' if _learned(runs) else ' **no**'}"
        package = f"{case.package} {first['version']}"
        halted = f"{halts[0]['fault']} at {halts[0]['step']}" if halts else "no"
        lines.append(
            f"| {case.id} | {case.title} | {package} | {first['parameters']:,} | {first['steps']} | {course} "
            f"| {sum(map(alarms, runs))} | {halted} | {_word([run['ordered'] for run in runs])} "
            f"| {_word([_same(first, bare.get(case.id))])} |"
        )
    return "\n".join(lines) + "\n"


def _said(cases: Sequence[Model], guarded: Mapping[str, list[Mapping[str, Any]]]) -> str:
    lines = []
    for case in cases:
        for run in guarded[case.id]:
            for said in run.get("said", ()):
                first = said.splitlines()[0].removeprefix("GradGuard: ")
                lines.append(f"- {case.id}, seed {run['seed']}: {first}")
    return "\n".join(["False alarms, in their first line:\n", *lines, ""]) if lines else ""


def _broken_table(
    cases: Sequence[Model],
    guarded: Mapping[str, list[Mapping[str, Any]]],
    bare: Mapping[str, Mapping[str, Any]],
) -> str:
    ran = [c for c in cases if guarded[c.id]]
    faults = sum(all(right_fault(c, run) for run in guarded[c.id]) for c in ran)
    causes = sum(all(right_cause(c, run) for run in guarded[c.id]) for c in ran)
    lines = [
        f"**{len(ran)} mistakes: fault or mistake named in {faults}, cause first in {causes}.**\n",
        "| case | model | mistake | without us | first said | cause | first fix | fault | cause right |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in ran:
        runs = guarded[case.id]
        first = runs[0]
        alone = bare.get(case.id)
        course = f"{_number(alone['from'])} to {_number(alone['to'])}" if alone else "-"
        warned = [f for f in first["findings"] if f["severity"] >= WARNING]
        said = (
            f"{warned[0]['fault']} at {warned[0]['step']}"
            if warned
            else "check-up or graph"
            if first["said"]
            else "nothing"
        )
        cause = first["causes"][0].replace("_", " ") if first["causes"] else ""
        lines.append(
            f"| {case.id} | {case.title} | {case.broken} | {course} | {said} "
            f"| {cause} | {first['fix']} | {_word([right_fault(case, r) for r in runs])} "
            f"| {_word([right_cause(case, r) for r in runs])} |"
        )
    return "\n".join(lines) + "\n"


def _is_noisy(run: Mapping[str, Any]) -> bool:
    return bool(run.get("said") or run.get("warnings") or run.get("halted"))


def _learned(runs: Sequence[Mapping[str, Any]]) -> bool:
    return all(run.get("learned") for run in runs)


def _same(run: Mapping[str, Any], bare: Mapping[str, Any] | None) -> bool | None:
    """Return True if both runs had the same losses; up to the halt, if there was one."""
    if bare is None or not bare.get("losses"):
        return None
    losses = run["losses"]
    return losses == bare["losses"][: len(losses)] and (
        bool(run["halted"]) or len(losses) == len(bare["losses"])
    )


def _word(values: Sequence[bool | None]) -> str:
    if all(value is None for value in values):
        return "-"
    return "yes" if all(values) else "**no**"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _last_line(error: str) -> str:
    return error.strip().splitlines()[-1][:120].replace("|", "/")
