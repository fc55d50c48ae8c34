"""Warnings of the guard, given by one rank."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from lightning_gradguard.results import GradientWarning

_PACKAGE = str(Path(__file__).parents[1])


def warn(message: str) -> None:
    """Warn on rank 0, at the line that called the package."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_rank() != 0:
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"GradGuard: {message}", GradientWarning, stacklevel=level)
