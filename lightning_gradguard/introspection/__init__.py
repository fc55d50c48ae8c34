"""Observe what a model does: autograd graph, layer calls, gradients over depth and time, steps in a sandbox."""
