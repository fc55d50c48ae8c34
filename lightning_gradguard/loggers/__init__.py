"""Findings and statistics in TensorBoard, W&B, MLflow and any Lightning logger."""
