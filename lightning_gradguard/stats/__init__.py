"""Statistics of gradients: one pass over them at each step, and running statistics that detectors share."""

from lightning_gradguard.stats.grad_stats import GradStats as GradStats
