"""Where findings and statistics are shown: TensorBoard, and any logger."""
