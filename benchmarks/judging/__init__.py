"""Scoring for `benchmarks/detection.py`: rivals' rules, recording callbacks, scores and tables."""
