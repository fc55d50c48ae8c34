"""Detectors: what counts as a fault, one file a family."""
