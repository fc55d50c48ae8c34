"""Facts of a run without the package under test, and the facts that define each fault."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.zoo.case import Case
from lightning_gradguard import Fault

#: Steps after the onset within which a fault must show.
WINDOW = 50
#: Steps after the onset within which an overflow may hide its cause.
OVERFLOW = 10


class Facts(L.Callback):
    """Callback that records norms, losses, true update ratios and zero rows of a run.

    Put it first in the list of callbacks.

    Attributes:
        table: Filled when training ends; see `summary`.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.ratios: list[float] = []
        self.median_ratios: list[float] = []
        self.nonfinite: int | None = None
        self._rows: dict[str, list[float]] = {}
        self._relative: dict[str, list[float]] = {}
        self._alive: set[str] = set()
        self._zeros: list[float] = []
        self._loss = math.nan
        self._before: dict[str, Tensor] = {}
        self._watched: list[tuple[str, Tensor]] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._loss = float(loss.detach()) / (1.0 if scaler is None else scaler.get_scale() or math.nan)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        step = trainer.global_step
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = [(n, p) for n, p in pl_module.named_parameters() if id(p) in owned]
        self._watched = named
        self._before = {n: p.detach().clone() for n, p in named}
        grads = {n: p.grad.detach().float() for n, p in named if p.grad is not None and not p.grad.is_sparse}
        norms = {n: float(g.norm()) for n, g in grads.items()}
        self.norms.append(math.sqrt(sum(v * v for v in norms.values())))
        self.losses.append(self._loss)
        if self.nonfinite is None and not (math.isfinite(self.norms[-1]) and math.isfinite(self._loss)):
            self.nonfinite = step
        if step < self.case.onset:
            return
        layers = [n for n, p in named if p.ndim >= 2]
        if layers and layers[-1] in grads:
            self._zeros.append(float((grads[layers[-1]] == 0).float().mean()))
        for name, parameter in named:
            norm = norms.get(name, 0.0)
            if norm > 0:
                self._alive.add(name)
            if len(self._relative.setdefault(name, [])) < WINDOW:
                weight = max(float(parameter.detach().float().norm()), 1e-30)
                self._relative[name].append(norm / weight)
            if parameter.ndim >= 2 and name in grads:
                rows = grads[name].flatten(1).abs().amax(1) == 0
                self._rows.setdefault(name, []).append(float(rows.float().mean()))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if not self._before:
            return
        ratios = []
        for name, parameter in self._watched:
            before = self._before[name].float()
            moved = float((parameter.detach().float() - before).norm())
            if parameter.ndim >= 2:
                # A tenth of a typical initialisation, or a tensor that starts at zero would seem to make a
                # large update.
                usual = 0.1 * math.sqrt(before.numel() / before[0].numel())
                ratios.append(moved / max(float(before.norm()), usual))
        self._before = {}
        if trainer.global_step > self.case.onset and ratios:
            self.ratios.append(max(ratios))
            self.median_ratios.append(sorted(ratios)[len(ratios) // 2])

    def summary(self) -> dict[str, Any]:
        """Return the facts in numbers, from the onset on unless stated otherwise.

        ``gap``: decades (factors of ten) by which the culprits' relative gradients lie below those of the
        layer with the largest. ``loss_growth``: largest running mean of the loss over the first loss.
        ``rise``: decades by which the first layer's relative gradient lies above the last one's. ``jump``:
        norm at the onset over the median of the fifty steps before. ``dead_share``: mean share of zero rows
        in the culprits, over the last fifty steps.
        """
        onset = self.case.onset
        relative = {n: _middle(v) for n, v in self._relative.items() if v}
        culprits = [v for n, v in relative.items() if self.case.is_culprit(n)]
        rows = [
            sum(v[-WINDOW:]) / len(v[-WINDOW:])
            for n, v in self._rows.items()
            if self.case.is_culprit(n) and v
        ]
        owned = {n for n, _ in self._watched}
        silent = [n for n in self._relative if self.case.is_culprit(n) and n not in self._alive]
        before = self.norms[max(0, onset - WINDOW) : onset]
        return {
            "loss_first": _mean(self.losses[:10]),
            "loss_last": _mean(self.losses[-10:]),
            "loss_growth": self._growth(),
            "norm_growth": _ratio(_middle(self.norms[-20:]), _middle(self.norms[:20])),
            "nonfinite_step": self.nonfinite,
            "gap": _decades(max(relative.values(), default=0.0), _middle(culprits)) if culprits else None,
            "relative_gradient": _middle(culprits) if culprits else None,
            "largest_update": max((r for r in self.ratios if math.isfinite(r)), default=None),
            "usual_update": _middle(self.median_ratios[:WINDOW]) if self.median_ratios else None,
            "dead_share": max(rows, default=0.0),
            "silent": len(silent) / max(1, sum(self.case.is_culprit(n) for n in owned | set(self._relative))),
            "zero_share_at_output": _mean(self._zeros[:WINDOW]) if self._zeros else None,
            "rise": self._rise(relative),
            "jump": _ratio(self.norms[onset], _middle(before))
            if before and len(self.norms) > onset
            else None,
        }

    def _rise(self, relative: dict[str, float]) -> float | None:
        layers = [relative[n] for n, p in self._watched if p.ndim >= 2 and relative.get(n, 0.0) > 0]
        return _decades(layers[0], layers[-1]) if len(layers) > 1 else None

    def _growth(self) -> float | None:
        if len(self.losses) < 10:
            return None
        start, mean, most = self.losses[0], self.losses[0], 0.0
        for loss in self.losses:
            if not math.isfinite(loss):
                return math.inf
            mean += 0.1 * (loss - mean)
            most = max(most, mean)
        return _ratio(most, start)


def is_right_name(name: Fault, case: Case, facts: Mapping[str, Any]) -> bool:
    """Return True if the facts of a run support this name for its fault.

    An overflow is another name for something else only within `OVERFLOW` steps, before anything else can
    show.

    An overflow is another name for something else only within `OVERFLOW` steps, before anything else can be seen.
    """
    if name == Fault.NONFINITE != case.fault:
        step = facts["nonfinite_step"]
        return step is not None and case.onset <= step <= case.onset + OVERFLOW
    return supports(name, facts, case.onset)


def supports(fault: Fault, facts: Mapping[str, Any], onset: int) -> bool:
    """Return True if the facts of a run meet the definition of the fault."""
    test: Callable[[], bool] = {
        Fault.NONFINITE: lambda: facts["nonfinite_step"] is not None and facts["nonfinite_step"] >= onset,
        Fault.UNDERFLOW: lambda: _at_least(facts["zero_share_at_output"], 0.9),
        Fault.DISCONNECTED: lambda: facts["silent"] == 1.0,
        Fault.DEAD: lambda: facts["dead_share"] >= 0.9,
        Fault.VANISHING: lambda: (
            _at_least(facts["gap"], 2.0) or not _at_least(facts["relative_gradient"], 1e-5)
        ),
        Fault.VANISHING_IN_TIME: lambda: _at_least(facts.get("time_tilt"), 4.0),
        Fault.EXPLODING: lambda: (
            facts["nonfinite_step"] is not None
            or _at_least(facts["loss_growth"], 3.0)
            or _at_least(facts["norm_growth"], 10.0)
            or _at_least(facts.get("rise"), 0.9)
        ),
        Fault.SPIKE: lambda: _at_least(facts["jump"], 10.0),
        Fault.OVERSIZED_UPDATE: lambda: _at_least(facts["largest_update"], 0.1),
        Fault.STALLED: lambda: not _at_least(facts["usual_update"], 1e-6),
    }[fault]
    return bool(test())


def time_tilt(training: Any) -> float:
    """Return the decades from the gradient of the first tenth of the input steps to that of the last tenth."""
    x, y = training.batch(0)
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        loss = training.task.loss(training.net(x), y)
        (gradient,) = torch.autograd.grad(loss, x)
    norms = gradient.flatten(2).norm(dim=2).mean(0) if gradient.ndim > 2 else gradient.norm(dim=0)
    tenth = max(1, len(norms) // 10)
    return _decades(float(norms[-tenth:].norm()), float(norms[:tenth].norm()))


def _middle(values: list[float]) -> float:
    finite = sorted(v for v in values if math.isfinite(v))
    return finite[len(finite) // 2] if finite else math.nan


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 and math.isfinite(b) else None


def _decades(high: float, low: float) -> float:
    return (
        math.log10(max(high, 1e-45) / max(low, 1e-45)) if math.isfinite(high) and math.isfinite(low) else 0.0
    )


def _at_least(value: float | None, limit: float) -> bool:
    return value is not None and value >= limit
