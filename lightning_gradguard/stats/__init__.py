"""Statistics of gradients: one pass over them at each step, and running statistics that detectors share."""
