"""What `benchmarks/detection.py` judges with: rivals' rules, listeners, scores and tables."""
