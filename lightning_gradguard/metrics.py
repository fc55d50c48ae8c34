"""Torchmetrics for gradients.

Mean norm, share of clipped steps, and share of spikes in a series.

``update`` reads nothing on the host and ignores values that are NaN or infinite. ``compute`` pools the steps of all
ranks, and returns NaN before the first value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_gradguard.validation import check_positive, check_whole

#: Earlier values that `SpikeScore` needs before one can be a spike: the spread of fewer says little.
MIN_HISTORY = 25


class GradientNorm(Metric):
    """Mean gradient norm since the last reset.

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
        """Add one norm, or several.

        Args:
            norm: Norm of one step, such as ``report.total_norm``, or of several in any shape.
        """
        values = torch.as_tensor(norm, device=self.device).detach().to(self.total.dtype)
        finite = torch.isfinite(values)
        self.total = self.total + torch.where(finite, values, 0).sum()
        self.steps = self.steps + finite.sum()

    def compute(self) -> Tensor:
        """Return the mean, scalar."""
        return self.total / self.steps


class ClipRate(Metric):
    """Share of clipped steps, 0 to 1.

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
        """Add one step, or several.

        Args:
            scale: Multiplier of the gradients, such as ``report.scale``. Below 1 counts as clipped, so a skipped step,
                which has 0, does too. Or a bool: whether the step was clipped.
        """
        values = torch.as_tensor(scale, device=self.device).detach()
        clipped = values if values.dtype == torch.bool else values < 1
        finite = torch.isfinite(values)
        self.clipped = self.clipped + (clipped & finite).sum()
        self.steps = self.steps + finite.sum()

    def compute(self) -> Tensor:
        """Return the share, scalar."""
        return self.clipped / self.steps


class SpikeScore(Metric):
    """Share of spikes in a series, 0 to 1.

    A spike lies at least ``sigma`` standard deviations from the rolling mean. Mean and (population) standard deviation
    are those of the last ``window`` values before the one in question. The first 25 values, or ``window`` if that is
    less, are never spikes. Each rank has a series of its own.

    Example:
        >>> score = SpikeScore()
        >>> score.update(torch.tensor([1.0, 2.0] * 50))
        >>> score.update(40.0)
        >>> score.compute()
        tensor(0.0099)

    Args:
        window: Number of values in the rolling mean, 2 or more.
        sigma: Distance from which a value is a spike, in standard deviations.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        TypeError: If ``window`` or ``sigma`` is no number.
        ValueError: If ``window`` is no whole number of 2 or more, or ``sigma`` is not positive and finite.

    Source: "spike score" of the OLMo 2 report (2025), arXiv:2501.00656, with a window of 1000 and 7 sigma.
    """

    is_differentiable = False
    higher_is_better = False
    # A value is a spike or not by those before it, which the state of one batch does not hold.
    full_state_update = True

    recent: Tensor
    seen: Tensor
    spikes: Tensor
    steps: Tensor

    def __init__(self, window: int = 1000, sigma: float = 7.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_whole("window", window, 2)
        check_positive("sigma", sigma)
        self.window, self.sigma = window, sigma
        self.add_state("recent", torch.zeros(window), dist_reduce_fx=None)
        self.add_state("seen", torch.tensor(0), dist_reduce_fx=None)
        self.add_state("spikes", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("steps", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, value: Tensor | float) -> None:
        """Add one value, or several in order.

        Args:
            value: Loss or gradient norm of one step, or of several in any shape.
        """
        for one in torch.as_tensor(value, device=self.device).detach().to(self.recent.dtype).reshape(-1):
            self._add(one)

    def compute(self) -> Tensor:
        """Return the share, scalar."""
        return self.spikes / self.steps

    def _add(self, value: Tensor) -> None:
        place = torch.arange(self.window, device=value.device)
        known = place < self.seen
        count = torch.clamp(self.seen, 1, self.window)
        mean = torch.where(known, self.recent, 0).sum() / count
        std = (torch.where(known, self.recent - mean, 0).square().sum() / count).sqrt()
        distance = (value - mean).abs()
        finite = torch.isfinite(value)
        # In a constant series any other value is a spike, and the same value is none.
        spike = (distance >= self.sigma * std) & (distance > 0) & (self.seen >= min(MIN_HISTORY, self.window))
        self.recent = torch.where(finite & (place == self.seen % self.window), value, self.recent)
        self.seen = self.seen + finite
        self.spikes = self.spikes + (finite & spike)
        self.steps = self.steps + finite
