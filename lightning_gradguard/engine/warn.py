"""Warnings of the guard, given by one rank, at the line that called the package."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from lightning_gradguard.results import GradientWarning

_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def warn(message: str) -> None:
    """Warn on rank 0, with the guard's prefix."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        warn_caller(f"GradGuard: {message}")


def warn_caller(message: str) -> None:
    """Warn at the innermost line outside the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, GradientWarning, stacklevel=level)
