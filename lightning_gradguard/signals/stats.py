"""Old import path of `lightning_gradguard.stats.grad_stats`."""

from lightning_gradguard.stats.grad_stats import GradStats as GradStats

__all__ = ["GradStats"]
