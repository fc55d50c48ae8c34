"""Observe what a model does and run its steps."""
