"""`GradStats`: one step's gradients as vectors of numbers.

One pass over P gradients reduces them to vectors of P numbers, on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.stats.layout import Layout, pattern_of
from lightning_gradguard.stats.norms import norms_of
from lightning_gradguard.stats.sharding import align_gradients

if TYPE_CHECKING:
    from lightning_gradguard.stats.trends import Trends

#: Norm from which a step counts as non-finite: its square overflows float32, and with it a second moment.
LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class GradStats:
    """One step's gradients of P tensors, as vectors.

    The vectors lie on the device of the first tensor. A full evaluation is a step at which `slow` detectors are
    evaluated too: often among the first 32 steps, then every eighth, and up to every 64th while nothing changes. A
    sampled step is one at which more than norms is read; in between, those values stay.

    Attributes:
        layout: Names, order and shapes of the tensors.
        gradients: The P gradients, None where there is none.
        pattern: P times whether there is a gradient, for the host.
        norms: float32 [P], L2 norm of each gradient; 0 where there is none.
        present: Bool [P], whether there is a gradient.
        weights: float32 [P], L2 norm of each parameter at its last refresh, at least ``layout.floors``.
        log_weights: float32 [P], their natural logarithms.
        updates: float32 [P], applied update ratio ‖Δw‖/‖w‖ at the last sampled step; NaN before the first.
        total: float32 [], global norm.
        loss: float32 [], NaN if none was given.
        has_loss: Whether a loss was given.
        dead: float32 [P], share of output rows with an all-zero gradient at the last sampled step.
        lost: float32 [P], share of a half-precision gradient that is zero or subnormal there.
        cut: Bool [P], tensors that took part in the forward pass but have no path from the loss.
        unused: Bool [P], trainable tensors that took no part in the forward pass.
        ran: Bool [P], trainable tensors that took part in it.
        idle: Bool [P], tensors that took part in it, and whose result the loss does not use.
        constant: Bool [P], tensors whose gradient is zero by design: they choose among one.
        hollow: Bool [P], layers whose input was exactly zero when it was looked at.
        recurrent: Bool [P], tensors that are applied repeatedly in one pass.
        normalised: Bool [P], tensors whose scale a normalization right behind them removes.
        selected: Bool [P], tensors of whose results only some are chosen, such as the k largest.
        time_tilt: float32 [], decades (factors of ten) by which gradients fall from the last to the first tenth of a
            sequence; NaN where it was not measured.
        excess: float32 [], loss over that of the best constant guess, at the newest sampled step at which the caller
            knew it; NaN where it is not known.
        reach: float32 [], size of the outputs over that of their targets, the same.
        update_ratio: float32 [], median of ``updates`` over the layers; NaN before the first.
        sampled_steps: Steps that a new sample of ``updates`` stands for; 0 if there is none.
        elapsed: Good steps that this full evaluation stands for, at most 8; 0 if this is none.
        is_first: Whether this is one of the first 32 steps.
        passed: Steps that the fast path accepted since detectors were last evaluated.
        stair: Most steps with one and the same learning rate before it was raised; 0 if it was not raised.
        steady: Steps in a row with the newest learning rate; 0 if it is not known.
        rest: Steps in a row with a learning rate below a tenth of its peak, so that small updates are intended, over
            the steps at the peak rate that would train as much as all steps so far did; 0 if the rate is higher, or
            this is no full evaluation.
        changed: float32 [P], share of the elements with a gradient that the last sampled step changed; NaN where it is
            unknown, and for tensors that are not stored in half precision.
        loss_scale: float32 [], scale of the gradient scaler; NaN without one.
        carried: float32 [], 1 if the gradient of the step before was still there when this one's was added to it, 0 if
            not; NaN if that was not observed.
        noise: How many times larger than usual the noise of this step's gradient is, since its batch is smaller: the
            square root of how many times smaller; at least 1.
        low_precision: Whether gradients are computed, or scaled, in half precision.
        surrogate: Whether the loss is that of a policy gradient, whose value does not tell how well the policy does.
        moments: float32 [P], norms that the optimizer's second moments tell, at the first step that is evaluated; NaN
            where it has none, and at later steps.
        adaptive: Whether the optimizer's steps hardly depend on the scale of gradients; False if it is not known.
    """

    layout: Layout
    gradients: tuple[Tensor | None, ...]
    pattern: tuple[bool, ...]
    norms: Tensor
    present: Tensor
    weights: Tensor
    log_weights: Tensor
    updates: Tensor
    total: Tensor
    loss: Tensor
    has_loss: bool
    dead: Tensor
    lost: Tensor
    cut: Tensor
    unused: Tensor
    ran: Tensor
    idle: Tensor
    constant: Tensor
    hollow: Tensor
    recurrent: Tensor
    normalised: Tensor
    selected: Tensor
    time_tilt: Tensor
    update_ratio: Tensor
    excess: Tensor
    reach: Tensor
    changed: Tensor
    loss_scale: Tensor
    carried: Tensor
    moments: Tensor
    sampled_steps: int = 0
    elapsed: int = 1
    is_first: bool = True
    passed: int = 0
    rest: float = 0.0
    stair: int = 0
    steady: int = 0
    noise: float = 1.0
    low_precision: bool = False
    surrogate: bool = False
    adaptive: bool = False
    _trends: Trends | None = field(default=None, repr=False)

    @property
    def trends(self) -> Trends:
        """Running statistics up to this step.

        Raises:
            ValueError: If they are not set, which `Guard` does before it evaluates detectors.
        """
        if self._trends is None:
            raise ValueError(
                "stats.trends must be set before detectors run: "
                "trends, state = update(stats, state); stats = stats.with_trends(trends)"
            )
        return self._trends

    @cached_property
    def finite(self) -> Tensor:
        """True if global norm and loss are finite, bool []."""
        number = self.layout.constant
        # Zero times what is not finite is NaN.
        both = torch.addcmul(self.total, self.loss, number(0.0)) if self.has_loss else self.total
        # The square of the norm must be finite too, or an optimizer's second moment is not. False for NaN.
        return both < number(LARGEST_NORM)

    @cached_property
    def starved(self) -> Tensor:
        """Layers whose input is exactly zero, bool [P].

        Their weight gets a gradient of zero, and their bias does not: it gets the gradient of their output.
        """
        zero = self.layout.is_layer & self.present & (self.norms == 0)
        has_output = self.norms[self.layout.biases] > 0
        return zero & (has_output | self.hollow if self.is_marked(self.hollow) else has_output)

    def is_marked(self, mask: Tensor) -> bool:
        """Return False if it is known, without a look at the device, that a mask [P] holds no tensor."""
        return mask is not self.layout.nowhere

    @cached_property
    def relative(self) -> Tensor:
        """Relative size log10(‖g‖/‖w‖), float32 [P].

        It is -inf where the gradient is zero.
        """
        return (self.log_norms - self.log_weights) * self.layout.constant(1 / math.log(10))

    @cached_property
    def log_norms(self) -> Tensor:
        """Natural logarithms of the norms, float32 [P]."""
        return self.norms.log()

    def replace(self, **changes: Any) -> GradStats:
        """Return a copy with some fields replaced."""
        # Many times faster than `dataclasses.replace`.
        copy = object.__new__(GradStats)
        vars(copy).update(vars(self), **changes)
        return copy

    def with_trends(self, trends: Trends, passed: int = 0) -> GradStats:
        """Return a copy for detectors.

        Args:
            trends: Running statistics up to this step.
            passed: Steps that the fast path accepted since detectors were last evaluated.
        """
        return self.replace(_trends=trends, passed=passed)


class NoState(NamedTuple):
    """Empty state of a detector or clipper."""


def measure(layout: Layout, weights: Tensor, updates: Tensor, loss: Tensor | None = None) -> GradStats:
    """Measure the current gradients, reading each once.

    Collective if the tensors are sharded: every rank has to call it.

    Args:
        layout: The tracked tensors.
        weights: float32 [P] weight norms, from `weight_norms`.
        updates: float32 [P] applied update ratios.
        loss: Scalar loss of this step, or None.
    """
    gradients = gradients_of(layout)
    weights = torch.maximum(weights, layout.floors)
    return stats_of(layout, gradients, norms_of(gradients, layout), weights, updates, loss)


def stats_of(
    layout: Layout,
    gradients: tuple[Tensor | None, ...],
    norms: Tensor,
    weights: Tensor,
    updates: Tensor,
    loss: Tensor | None,
    **known: Any,
) -> GradStats:
    """Return the statistics that follow from gradient norms.

    Args:
        layout: The tracked tensors.
        gradients: The P gradients.
        norms: float32 [P], their norms.
        weights: float32 [P], norms of the weights, at least ``layout.floors``.
        updates: float32 [P], applied update ratios.
        loss: Scalar loss of this step, or None.
        **known: Other fields of `GradStats`; one that is left out counts as not measured.
    """
    total, number = torch.linalg.vector_norm(norms), layout.constant
    value = number(torch.nan) if loss is None else loss.detach().to(total.device, torch.float32)
    pattern = known.pop("pattern", None) or pattern_of(gradients)
    if "log_weights" not in known:
        known["log_weights"] = weights.log()
    # As in `replace`: the `__init__` of a frozen class costs twice as much, at every step.
    made = object.__new__(GradStats)
    vars(made).update(
        layout.unmeasured,
        layout=layout,
        gradients=gradients,
        pattern=pattern,
        norms=norms,
        present=layout.presence(pattern),
        weights=weights,
        updates=updates,
        total=total,
        loss=value if value.ndim == 0 else value.reshape(()),
        has_loss=loss is not None,
    )
    vars(made).update(known)
    return made


def gradients_of(layout: Layout) -> tuple[Tensor | None, ...]:
    """Return the current gradients, sharded as their parameters."""
    if layout.shards is not None:
        align_gradients(layout.parameters)
    return tuple([p.grad for p in layout.parameters])
