"""Warnings of the guard, given by one rank."""

from __future__ import annotations

import warnings

import torch

from lightning_gradguard.results import GradientWarning


def warn(message: str) -> None:
    """Warn on rank 0 with a `GradientWarning`."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        warnings.warn(f"GradGuard: {message}", GradientWarning, stacklevel=4)
