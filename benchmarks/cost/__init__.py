"""What a guarded step and a guarded training cost: parts of ``benchmarks/overhead.py``."""
