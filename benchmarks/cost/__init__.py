"""Cost of a guarded step and a guarded training: the parts of ``benchmarks/overhead.py``."""
