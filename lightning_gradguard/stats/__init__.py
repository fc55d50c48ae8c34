"""Statistics of gradients, per step and over time."""

from lightning_gradguard.stats.grad_stats import GradStats as GradStats
