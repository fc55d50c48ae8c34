"""Clippers: how gradients are scaled, and the interface of a clipper."""
