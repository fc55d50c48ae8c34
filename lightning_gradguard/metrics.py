"""Torchmetrics for gradients: the norm, the share of clipped steps, and how spiky a series is.

All live on the device of what they are given, read nothing on the host in ``update``, and ignore values that are NaN
or infinite. Ranks are pooled when computed, so a value is that of all ranks' steps together. NaN before the first
value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

#: Earlier values that `SpikeScore` needs before it judges one: the spread of fewer says little.
MIN_HISTORY = 25


class GradientNorm(Metric):
    """Mean of the gradient norms since the last reset, in the gradient's unit.

    Example:
        >>> norm = GradientNorm()
        >>> for value in (1.0, 3.0, float("nan")):
        ...     norm.update(value)
        >>> norm.compute()
        tensor(2.)

    Args:
        kwargs: Passed to `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    total: Tensor
    steps: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("steps", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, norm: Tensor | float) -> None:
        """Counts one norm, or each of several.

        Args:
            norm: Norm of one step, or of several in any shape, such as ``report.total_norm``.
        """
        values = torch.as_tensor(norm, device=self.device).detach().to(self.total.dtype)
        finite = torch.isfinite(values)
        self.total = self.total + torch.where(finite, values, 0).sum()
        self.steps = self.steps + finite.sum()

    def compute(self) -> Tensor:
        """The mean, scalar."""
        return self.total / self.steps


class ClipRate(Metric):
    """Share of steps whose gradients were scaled down, 0 to 1.

    Example:
        >>> rate = ClipRate()
        >>> for scale in (1.0, 0.25, 1.0, 1.0):
        ...     rate.update(scale)
        >>> rate.compute()
        tensor(0.2500)

    Args:
        kwargs: Passed to `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    clipped: Tensor
    steps: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("clipped", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("steps", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scale: Tensor | float | bool) -> None:
        """Counts one step, or each of several.

        Args:
            scale: What the gradients were multiplied with, such as ``report.scale``: below 1 is clipped, so a skipped
                step, which has 0, counts as clipped. Or a bool: whether the step was clipped.
        """
        values = torch.as_tensor(scale, device=self.device).detach()
        clipped = values if values.dtype == torch.bool else values < 1
        finite = torch.isfinite(values)
        self.clipped = self.clipped + (clipped & finite).sum()
        self.steps = self.steps + finite.sum()

    def compute(self) -> Tensor:
        """The share, scalar."""
        return self.clipped / self.steps


class SpikeScore(Metric):
    """Share of values that lie at least ``sigma`` standard deviations from the rolling mean, 0 to 1.

    Mean and (population) standard deviation are those of the last ``window`` values before the one in question. The
    first 25 values, or ``window`` if that is less, are never spikes. Of each rank's series by itself, then pooled.

    Example:
        >>> score = SpikeScore()
        >>> score.update(torch.tensor([1.0, 2.0] * 50))
        >>> score.update(40.0)
        >>> score.compute()
        tensor(0.0099)

    Args:
        window: Values that the rolling mean is taken over, 2 or more.
        sigma: Distance at which a spike begins, in standard deviations.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If ``window`` is no whole number of 2 or more, or ``sigma`` not positive and finite.

    Source: "spike score" of the OLMo 2 report (2025), arXiv:2501.00656, with a window of 1000 and 7 sigma.
    """

    is_differentiable = False
    higher_is_better = False
    # Whether a value is a spike depends on those before it, which a state of the batch alone does not hold.
    full_state_update = True

    recent: Tensor
    seen: Tensor
    spikes: Tensor
    steps: Tensor

    def __init__(self, window: int = 1000, sigma: float = 7.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(window, int) or isinstance(window, bool) or window < 2:
            raise ValueError(f"window must be a whole number, 2 or more, got {window!r}")
        if not isinstance(sigma, int | float) or isinstance(sigma, bool) or not 0 < sigma < float("inf"):
            raise ValueError(f"sigma must be positive and finite, got {sigma!r}")
        self.window, self.sigma = window, sigma
        self.add_state("recent", torch.zeros(window), dist_reduce_fx=None)
        self.add_state("seen", torch.tensor(0), dist_reduce_fx=None)
        self.add_state("spikes", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("steps", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, value: Tensor | float) -> None:
        """Judges one value, or several in order.

        Args:
            value: Loss or gradient norm of one step, or of several in any shape.
        """
        for one in torch.as_tensor(value, device=self.device).detach().to(self.recent.dtype).reshape(-1):
            self._judge(one)

    def compute(self) -> Tensor:
        """The share, scalar."""
        return self.spikes / self.steps

    def _judge(self, value: Tensor) -> None:
        place = torch.arange(self.window, device=value.device)
        known = place < self.seen
        held = torch.clamp(self.seen, 1, self.window)
        mean = torch.where(known, self.recent, 0).sum() / held
        std = (torch.where(known, self.recent - mean, 0).square().sum() / held).sqrt()
        distance = (value - mean).abs()
        finite = torch.isfinite(value)
        # In a constant series any other value is a spike, the same value is none.
        spike = (distance >= self.sigma * std) & (distance > 0) & (self.seen >= min(MIN_HISTORY, self.window))
        self.recent = torch.where(finite & (place == self.seen % self.window), value, self.recent)
        self.seen = self.seen + finite
        self.spikes = self.spikes + (finite & spike)
        self.steps = self.steps + finite
