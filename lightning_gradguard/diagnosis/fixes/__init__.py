"""Fixes for each cause, best first."""
