"""Try fixes on a copy of the training."""
