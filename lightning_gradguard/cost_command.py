"""``gradguard cost``: finds the model that was named, measures, and shows the table."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_gradguard.cost import BARE, CLIP, CYCLE, Timings, measure
from lightning_gradguard.signals.adaptive_clippers import AdaGC, AutoClip, ZClip
from lightning_gradguard.signals.clippers import AGC
from lightning_gradguard.signals.clipping import Clipper
from lightning_gradguard.signals.spike_clip import SpikeClip

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
